"""The commands: `datasette secrets …`, in the order of the help.

Results go to stdout, everything else to stderr. Exit code 0: all is well; 1: something is
wrong, said in one sentence; 2: bad usage; 3: done, and something is left that the message
names. Neither a key nor a value comes from the command line, which other users and the
shell's history can see.
"""

from __future__ import annotations

from . import changes, keys, reads

COMMANDS = (
    keys.generate_encryption_key,
    keys.new_key,
    keys.key_id,
    keys.rotate_key,
    keys.upgrade,
    keys.status,
    keys.verify,
    reads.list_,
    reads.history,
    reads.log,
    changes.set_,
    reads.get,
    reads.check,
    changes.import_,
    changes.note,
    changes.renew,
    changes.delete,
    changes.restore,
    changes.rollback,
    changes.destroy,
    changes.destroy_row,
)
