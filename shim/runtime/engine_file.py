"""`from runtime.engine_file import ModelCard`, as programs of the first layout have it."""

from fcn_deploy import ModelCard as ModelCard
