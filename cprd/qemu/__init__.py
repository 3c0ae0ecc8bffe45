"""A guest that outlives its QEMU: an unmodified QEMU leaves its CPR state and its migration stream
with cprd and exits; nobody runs; another QEMU, of another version or not, takes both, and the guest
goes on in the same RAM.

Pure: `stream` (the main channel), `command` (QEMU's command line), `hold` (a VM in a State), the
comparison of two machines (`disks`, `devices`, `machine`) and of a machine with a command line
(`drift`), `errors`. With I/O: `signals` (waits, and signals that break them off), `process`,
`files` (the open files of a process), `monitor` (QMP), `inventory` (what a QEMU has), `sockets`,
`source` (the QEMU that hands over), `target` (the QEMU that takes over), `spawn` (its start and its
guard), `examine` (can this VM be handed over), `doubt` (the hold that a killed helper left),
`handover` (the steps between a source and cprd), `tell` (cprd hears that a guest runs), `servers`
(what a QEMU is a client of), `agent` (the guest's clock). The verbs: `save`,
`start` (with its helper, `restore`), `upgrade`, `stop`.

docs/qemu.md tells the behaviour of QEMU and the reason of each order.
"""
