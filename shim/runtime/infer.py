"""`python -m runtime.infer`, which is the command label-images."""

from fcn_deploy.runtime.infer import main

if __name__ == "__main__":
    main()
