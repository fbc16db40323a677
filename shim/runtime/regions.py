"""`from runtime.regions import open_regions`, as programs of the first layout have it."""

from fcn_deploy.runtime.images.regions import open_regions as open_regions
