"""The rooms. Imported before torch, so that one setting reaches its threads."""

import os

# Threads that wait for each other soon sleep instead of spinning on. It costs nothing that could be
# measured; with other work on the machine, spinning made a training step several times as slow.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
