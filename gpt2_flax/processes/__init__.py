"""How the processes of a run find, meet and watch each other; read the modules in this order.

`launch` joins a process to its run. `place` finds the number of the process and the address HOST:PORT of process 0,
from the command line, the launcher or the metadata server of a TPU VM (`tpu_metadata`).

Process 0 starts a thread, the hub. It listens on PORT for itself and on PORT + 1 in place of JAX's coordinator.
`messages` defines the messages. In `joining` each process, also process 0, connects to the hub and says hello. In
`meeting` the hub admits the processes and drops strangers until all processes have come. In `peers` it compares their
facts (versions, config, data), receives their heartbeats, and decides when the run must end.

`watchdog` is the counterpart of the hub in each process: it sends the heartbeats and obeys the hub. `phases` counts the
progress of a process and limits the time without progress. A run ends for all processes when one process fails,
disappears or hangs, and each process then names that process; or when all processes are done.
"""
