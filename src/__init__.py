"""The rooms. Imported before torch, so that one setting reaches its threads."""

import os

# Threads that wait for each other sleep instead of spinning. On a machine with other work to do,
# spinning made a training step on two cores six times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
