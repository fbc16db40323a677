"""`from runtime.images import read_image`, as programs of the first layout have it."""

from fcn_deploy.runtime.images.read import read_image as read_image
