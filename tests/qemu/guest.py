"""The test guest: one boot sector that counts in RAM *and* in a CPU register.

RAM is shared between the old QEMU and the new one, so a counter in RAM alone goes on even when a
stale CPU state is replayed over it. The guest therefore counts in both places, prints both a
hundred times a second on the first serial port, and appends `DIFF` when they disagree. `BOOT` is
printed once a boot. Every 16th tick it writes the counter to sector 1 of its disk through the BIOS,
when it has a disk that takes it, and prints `W` after it was written (`E`: the BIOS reported an
error). A pressed power button switches the machine off. Between ticks the CPU is halted: an idle
guest costs next to nothing.

The bytes are spelled out beside their mnemonics, so that the tests need no toolchain. To check them
with a disassembler:

    python -m tests.qemu.guest > guest.bin
    objdump -D -b binary -m i8086 -M intel --adjust-vma=0x7c00 guest.bin
"""

from __future__ import annotations

import struct

ORIGIN = 0x7C00
SECTOR = 512

# One row an instruction: its bytes; the label it needs, with the width of the reference (1 and 2:
# relative to the next instruction, "abs": a 16-bit address); what it says.
_Row = tuple[str, str, str]
PROGRAM: list[_Row] = [
    ("fa", "", "cli"),
    ("31 c0", "", "xor ax,ax"),
    ("8e d8", "", "mov ds,ax"),
    ("8e c0", "", "mov es,ax"),
    ("8e d0", "", "mov ss,ax"),
    ("bc 00 7c", "", "mov sp,0x7c00"),
    ("88 16 10 80", "", "mov [0x8010],dl            ; the BIOS's number of the boot disk"),
    ("b0 34", "", "mov al,0x34                ; PIT channel 0, mode 2"),
    ("e6 43", "", "out 0x43,al"),
    ("b0 9c", "", "mov al,0x9c                ; 1193182 Hz / 0x2e9c = 100 Hz"),
    ("e6 40", "", "out 0x40,al"),
    ("b0 2e", "", "mov al,0x2e"),
    ("e6 40", "", "out 0x40,al"),
    ("ba 02 06", "", "mov dx,0x602               ; PM1 enable, where SeaBIOS puts it"),
    ("b8 00 01", "", "mov ax,0x100               ; the power button"),
    ("ef", "", "out dx,ax"),
    ("66 31 ed", "", "xor ebp,ebp                ; the counter in a register"),
    ("66 89 2e 00 80", "", "mov [0x8000],ebp           ; the counter in RAM"),
    ("be", "abs boot", "mov si,boot"),
    ("e8", "2 puts", "call puts"),
    (":tick", "", ""),
    ("fb", "", "sti"),
    ("f4", "", "hlt                        ; until the timer's next interrupt"),
    ("66 ff 06 00 80", "", "inc dword [0x8000]"),
    ("66 45", "", "inc ebp"),
    ("66 a1 00 80", "", "mov eax,[0x8000]"),
    ("e8", "2 hex", "call hex"),
    ("b0 20", "", "mov al,' '"),
    ("e8", "2 putc", "call putc"),
    ("66 89 e8", "", "mov eax,ebp"),
    ("e8", "2 hex", "call hex"),
    ("66 39 2e 00 80", "", "cmp [0x8000],ebp"),
    ("74", "1 same", "je same"),
    ("be", "abs diff", "mov si,diff"),
    ("e8", "2 puts", "call puts"),
    (":same", "", ""),
    ("f7 c5 0f 00", "", "test bp,15"),
    ("75", "1 line", "jnz line"),
    ("80 3e 10 80 80", "", "cmp byte [0x8010],0x80     ; booted from a hard disk?"),
    ("75", "1 line", "jne line"),
    ("b8 01 03", "", "mov ax,0x0301              ; int 13h: write one sector"),
    ("bb 00 80", "", "mov bx,0x8000              ; from the counter on"),
    ("b9 02 00", "", "mov cx,2                   ; cylinder 0, sector 2"),
    ("b6 00", "", "mov dh,0"),
    ("8a 16 10 80", "", "mov dl,[0x8010]"),
    ("66 55", "", "push ebp"),
    ("cd 13", "", "int 0x13"),
    ("66 5d", "", "pop ebp"),
    ("b0 57", "", "mov al,'W'"),
    ("73", "1 wrote", "jnc wrote"),
    ("b0 45", "", "mov al,'E'"),
    (":wrote", "", ""),
    ("e8", "2 putc", "call putc"),
    (":line", "", ""),
    ("b0 0a", "", "mov al,10"),
    ("e8", "2 putc", "call putc"),
    ("ba 00 06", "", "mov dx,0x600               ; PM1 status"),
    ("ed", "", "in ax,dx"),
    ("f6 c4 01", "", "test ah,1                  ; the power button?"),
    ("74", "1 tick", "jz tick"),
    ("be", "abs bye", "mov si,bye"),
    ("e8", "2 puts", "call puts"),
    ("ba 04 06", "", "mov dx,0x604               ; PM1 control"),
    ("b8 00 20", "", "mov ax,0x2000              ; S5: off"),
    ("ef", "", "out dx,ax"),
    ("eb", "1 tick", "jmp tick"),
    (":hex", "", "eax as eight digits"),
    ("b9 08 00", "", "mov cx,8"),
    (":digit", "", ""),
    ("66 c1 c0 04", "", "rol eax,4"),
    ("66 50", "", "push eax"),
    ("24 0f", "", "and al,15"),
    ("3c 0a", "", "cmp al,10"),
    ("1c 69", "", "sbb al,0x69"),
    ("2f", "", "das                        ; 0..15 becomes '0'..'F'"),
    ("e8", "2 putc", "call putc"),
    ("66 58", "", "pop eax"),
    ("e2", "1 digit", "loop digit"),
    ("c3", "", "ret"),
    (":putc", "", "al to the serial port"),
    ("50", "", "push ax"),
    ("ba fd 03", "", "mov dx,0x3fd               ; line status"),
    (":full", "", ""),
    ("ec", "", "in al,dx"),
    ("a8 20", "", "test al,0x20               ; room for one more?"),
    ("74", "1 full", "jz full"),
    ("58", "", "pop ax"),
    ("ba f8 03", "", "mov dx,0x3f8"),
    ("ee", "", "out dx,al"),
    ("c3", "", "ret"),
    (":puts", "", "the text at si, ended by a zero"),
    ("ac", "", "lodsb"),
    ("84 c0", "", "test al,al"),
    ("74", "1 done", "jz done"),
    ("e8", "2 putc", "call putc"),
    ("eb", "1 puts", "jmp puts"),
    (":done", "", ""),
    ("c3", "", "ret"),
    (":boot", "", ""),
    (b"BOOT\n\0".hex(), "", ""),
    (":diff", "", ""),
    (b" DIFF\0".hex(), "", ""),
    (":bye", "", ""),
    (b"OFF\n\0".hex(), "", ""),
]

_WIDTH = {"1": 1, "2": 2, "abs": 2}


def boot_sector() -> bytes:
    """The 512 bytes a BIOS loads at 0x7c00."""
    labels: dict[str, int] = {}
    at = ORIGIN
    for code, reference, _ in PROGRAM:
        if code.startswith(":"):
            labels[code[1:]] = at
            continue
        at += len(bytes.fromhex(code))
        if reference:
            at += _WIDTH[reference.split()[0]]
    out = bytearray()
    for code, reference, _ in PROGRAM:
        if code.startswith(":"):
            continue
        out += bytes.fromhex(code)
        if not reference:
            continue
        kind, label = reference.split()
        if kind == "abs":
            out += struct.pack("<H", labels[label])
        else:
            width = _WIDTH[kind]
            distance = labels[label] - (ORIGIN + len(out) + width)
            out += struct.pack("<b" if width == 1 else "<h", distance)
    assert len(out) <= SECTOR - 2, f"{len(out)} bytes do not fit a boot sector"
    return bytes(out).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


if __name__ == "__main__":
    import sys

    sys.stdout.buffer.write(boot_sector())
