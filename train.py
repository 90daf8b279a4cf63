"""Trains a recipe: composer train.py A.yaml [B.yaml …] [key=value …]"""

import sys

from prx_composer.training import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
