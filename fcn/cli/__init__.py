"""train-fcn and eval-fcn, one file a command."""
