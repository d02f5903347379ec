"""`python -m tests.full.frozen RECIPE ...` trains; the disk of rank 1 stops answering at its 200th read."""

import os
import time

from megatron_soda import train
from megatron_soda.data.store import Store

read, reads = Store.read, [0]


def frozen_read(self, start, count):
    reads[0] += 1
    if reads[0] == 200 and os.environ["RANK"] == "1":
        time.sleep(10_000)
    return read(self, start, count)


Store.read = frozen_read

if __name__ == "__main__":
    train.main()
