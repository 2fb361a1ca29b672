"""`torchrun ... -m bench.distributed_train`: see bench/train/distributed.py."""

import os
import sys

from bench.train.distributed import main

if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads outlive their group, and torch aborts where one frees its last tensor while Python ends
