"""A guest that outlives its QEMU: an unmodified QEMU leaves its CPR state and its migration stream
with cprd and exits; nobody runs; another QEMU, newer if one likes, takes both and the guest goes on
in the same RAM.

Pure: `stream` (what is on the main channel), `command` (QEMU's command line), `hold` (how a VM lies
in a State). With I/O: `qmp`, `process`, `private` (where our sockets lie), `version`, `record`
(taking from a QEMU), `replay` (giving to one), `guard` (what keeps a new QEMU from outliving its
helper), `settle` (what a death left in doubt), `preparing` (cprd's second while a guest stands),
`interrupt` (signals), `check`, and the verbs: `save`, `start`, `upgrade`, `stop`.

What QEMU does, and why each order is as it is, is in docs/qemu.md.
"""
