"""Small networks are faster on one thread, and tests must not depend on how busy the machine is."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
