"""The emulator's opcode tables as text: one line an entry (emulate.c:opcode_table, twobyte_table, opcode_map_0f_38 and
the groups they name; reference section 5.4).

A line is ``[prefix:]opcode[+count][/reg][form] name destination source source2 flags``:

* ``prefix`` (NP, 66, F2, F3): the entry is behind a table by mandatory prefix;
* ``reg``: ModRM.reg; ``form``: ``m`` memory only, ``r`` register only, ``=XX`` the whole ModRM byte;
* ``name`` is the mnemonic, perhaps with what tells its functions apart; ``-`` decodes, but cannot be executed;
* operands are of ``opcode_table.OPERANDS``, flags of ``opcode_table.FLAGS``.

What is not listed decodes to nothing, however much the shared decoder learns.
"""

from __future__ import annotations

from typing import Final

_ALU: Final = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
_SHIFTS: Final = ("rol", "ror", "rcl", "rcr", "shl", "shr", "shl", "sar")

ONE_BYTE: Final = """
06      push.sreg - - ES        stack no64
07      pop.sreg - - ES         stack no64
0E      push.sreg - - CS        stack no64
16      push.sreg - - SS        stack no64
17      pop.sreg - - SS         stack no64
1E      push.sreg - - DS        stack no64
1F      pop.sreg - - DS         stack no64
2F      das Acc - -             byte no64
40+8    inc Reg - -
48+8    dec Reg - -
50+8    push - Reg -            stack
58+8    pop Reg - -             stack
60      pusha - - -             stack no64
61      popa - - -              stack no64
63      movsxd Reg Mem32 -      modrm mov only64
68      push - Imm -            mov stack
69      imul.3 Reg Mem Imm       modrm
6A      push - ImmB -           mov stack
6B      imul.3 Reg Mem ImmB      modrm
6C      ins DI DX -             byte mov string unaligned perm
6D      ins DI DX -             mov string unaligned perm
6E      outs DX SI -            byte string perm
6F      outs DX SI -            string perm
70+16   jcc - ImmB -            near
84      test Mem Reg -          byte modrm nowrite
85      test Mem Reg -          modrm nowrite
86      xchg Mem Reg -          byte modrm lock pt
87      xchg Mem Reg -          modrm lock pt
88      mov Mem Reg -           byte modrm mov pt
89      mov Mem Reg -           modrm mov pt
8A      mov Reg Mem -           byte modrm mov
8B      mov Reg Mem -           modrm mov
8C      mov.from_sreg Mem - -   modrm mov pt
8Dm     lea Reg Mem -           noaccess
8E      mov.to_sreg - Mem16 -   modrm
8F/0    pop Mem - -             mov stack incsp twomem
90      nop.acc Reg Acc -
91+7    xchg.acc Reg Acc -
98      cbw Acc - -
99      cwd - Acc -
9A      callf - ImmF -          no64
9C      pushf - - -             stack
9D      popf - - -              stack
9E      sahf - - -
9F      lahf - - -
A0      mov Acc Mem -           byte mov memabs
A1      mov Acc Mem -           mov memabs
A2      mov Mem Acc -           byte mov memabs pt
A3      mov Mem Acc -           mov memabs pt
A4      movs DI SI -            byte mov string twomem
A5      movs DI SI -            mov string twomem
A6      cmps DI SI -            byte string nowrite twomem
A7      cmps DI SI -            string nowrite twomem
A8      test Acc Imm -          byte nowrite
A9      test Acc Imm -          nowrite
AA      stos DI Acc -           byte mov string
AB      stos DI Acc -           mov string
AC      lods Acc SI -           byte mov string
AD      lods Acc SI -           mov string
AE      scas DI Acc -           byte string nowrite
AF      scas DI Acc -           string nowrite
B0+8    mov Reg Imm -           byte mov
B8+8    mov Reg Imm64 -         mov
C2      ret - ImmU16 -          near
C3      ret - - -               near
C4      les Reg MemF ES         modrm no64
C5      lds Reg MemF DS         modrm no64
C6/0    mov Mem Imm -           byte mov pt
C7/0    mov Mem Imm -           mov pt
C8      enter - ImmU16 ImmB     stack
C9      leave - - -             stack
CA      retf - ImmU16 -
CB      retf - - -
CC      int3 - - -
CD      int - ImmB -
CE      into - - -              no64
CF      iret - - -
D4      aam Acc ImmU -          no64
D5      aad Acc ImmU -          no64
D6      salc Acc - -            byte no64
D7      xlat Acc XLat -         byte
D9/7m   fnstcw Mem16 - -        mov
DB=E3   fninit - - -
DD/7m   fnstsw Mem16 - -        mov
E0      loopne - ImmB -         near
E1      loope - ImmB -          near
E2      loop - ImmB -           near
E3      jcxz - ImmB -           near
E4      in Acc ImmU -           byte perm
E5      in Acc ImmU -           perm
E6      out ImmU Acc -          byte perm
E7      out ImmU Acc -          perm
E8      call - Imm -            near
E9      jmp - Imm -             near
EA      jmpf - ImmF -           no64
EB      jmp - ImmB -            near
EC      in Acc DX -             byte perm
ED      in Acc DX -             perm
EE      out DX Acc -            byte perm
EF      out DX Acc -            perm
F1      - - - -
F4      hlt - - -               priv
F5      cmc - - -
F6/0    test Mem Imm -          byte nowrite
F6/1    test Mem Imm -          byte nowrite
F6/2    not Mem - -             byte lock
F6/3    neg Mem - -             byte lock
F6/4    mul AccLo AccHi Mem     byte srcwrite
F6/5    imul AccLo AccHi Mem    byte srcwrite
F6/6    div AccLo AccHi Mem     byte srcwrite
F6/7    idiv AccLo AccHi Mem    byte srcwrite
F7/0    test Mem Imm -          nowrite
F7/1    test Mem Imm -          nowrite
F7/2    not Mem - -             lock
F7/3    neg Mem - -             lock
F7/4    mul AccLo AccHi Mem     srcwrite
F7/5    imul AccLo AccHi Mem    srcwrite
F7/6    div AccLo AccHi Mem     srcwrite
F7/7    idiv AccLo AccHi Mem    srcwrite
F8      clc - - -
F9      stc - - -
FA      cli - - -
FB      sti - - -
FC      cld - - -
FD      std - - -
FE/0    inc Mem - -             byte lock
FE/1    dec Mem - -             byte lock
FF/0    inc Mem - -             lock
FF/1    dec Mem - -             lock
FF/2    call.abs - Mem -        near
FF/3    callf - MemF -
FF/4    jmp.abs - Mem -         near
FF/5    jmpf - MemF -
FF/6    push - Mem -            stack twomem
FF/7    - - - -                 undef
"""

TWO_BYTE: Final = """
00/0    sldt Mem - -            prot
00/1    str Mem - -             prot
00/2    lldt - Mem16 -          prot priv
00/3    ltr - Mem16 -           prot priv
01/0m   sgdt Mem - -            mov
01/1m   sidt Mem - -            mov
01/2m   lgdt - Mem -            priv
01/3m   lidt - Mem -            priv
01/4    smsw Mem - -            mov
01/6    lmsw - Mem16 -          mov priv
01/7m   invlpg - Mem -          byte priv noaccess
01=C1   vmcall - - -            priv ud
01=C8   - - - -                 priv
01=C9   - - - -                 priv
01=D1   xsetbv - - -            priv
01=D8   - - - -                 prot priv perm svmpa
01=D9   vmcall - - -            prot ud
01=DA   - - - -                 prot priv perm svmpa
01=DB   - - - -                 prot priv perm svmpa
01=DC   - - - -                 prot priv perm svm
01=DD   - - - -                 prot priv perm svm
01=DE   - - - -                 prot priv perm svm
01=DF   - - - -                 prot priv perm svm
01=F9   - - - -                 perm tsc
05      syscall - - -           ud
06      clts - - -              priv
08      invd - - -              priv
09      wbinvd - - -            priv
0D      nop - Mem -             modrm noaccess
NP:10   movups Reg Mem -        mov sse unaligned
66:10   movupd Reg Mem -        mov sse unaligned
NP:11   movups Mem Reg -        mov sse unaligned
66:11   movupd Mem Reg -        mov sse unaligned
18      nop - Mem -             modrm noaccess
19      - - Mem -               modrm noaccess
1C+3    - - Mem -               modrm noaccess
1F      nop - Mem -             modrm noaccess
20      movcr.read Mem - -     modrm priv op3264 nomod perm cr
21      movdr.read Mem - -     modrm priv op3264 nomod perm dr
22      movcr.write - Mem -       modrm priv op3264 nomod perm cr
23      movdr.write - Mem -       modrm priv op3264 nomod perm dr
NP:28   movaps Reg Mem -        mov sse
66:28   movapd Reg Mem -        mov sse
NP:29   movaps Mem Reg -        mov sse
66:29   movapd Mem Reg -        mov sse
NP:2Bm  movntps Mem Reg -       mov sse
66:2Bm  movntpd Mem Reg -       mov sse
30      wrmsr - - -             priv
31      rdtsc - - -             perm tsc
32      rdmsr - - -             priv
33      rdpmc - - -             perm
34      sysenter - - -          ud
35      sysexit - - -           priv ud
40+16   cmovcc Reg Mem -        modrm
NP:6F   movq Reg Mem -          mov mmx
66:6F   movdqa Reg Mem -        mov sse
F3:6F   movdqu Reg Mem -        mov sse unaligned
NP:7F   movq Mem Reg -          mov mmx
66:7F   movdqa Mem Reg -        mov sse
F3:7F   movdqu Mem Reg -        mov sse unaligned
80+16   jcc - Imm -             near
90+16   setcc Mem - -           byte modrm mov
A0      push.sreg - - FS        stack
A1      pop.sreg - - FS         stack
A2      cpuid - - -
A3      bt Mem Reg -            modrm bit nowrite
A4      shld Mem Reg ImmB       modrm
A5      shld Mem Reg CL         modrm
A8      push.sreg - - GS        stack
A9      pop.sreg - - GS         stack
AA      rsm - - -               ud
AB      bts Mem Reg -           modrm bit lock pt
AC      shrd Mem Reg ImmB       modrm
AD      shrd Mem Reg CL         modrm
AE/0m   fxsave - - -            aligned16
AE/1m   fxrstor - - -           aligned16
NP:AE/7m clflush - Mem -        byte
66:AE/7m clflushopt - Mem -     byte
AF      imul.2 Reg Mem -         modrm
B0      cmpxchg Mem Reg -       byte modrm lock pt srcwrite
B1      cmpxchg Mem Reg -       modrm lock pt srcwrite
B2      lss Reg MemF SS         modrm
B3      btr Mem Reg -           modrm bit lock
B4      lfs Reg MemF FS         modrm
B5      lgs Reg MemF GS         modrm
B6      movzx Reg Mem8 -        modrm mov
B7      movzx Reg Mem16 -       modrm mov
BA/4    bt Mem ImmB -           bit nowrite
BA/5    bts Mem ImmB -          bit lock pt
BA/6    btr Mem ImmB -          bit lock
BA/7    btc Mem ImmB -          bit lock pt
BB      btc Mem Reg -           modrm bit lock pt
BC      bsf Reg Mem -           modrm
BD      bsr Reg Mem -           modrm
BE      movsx Reg Mem8 -        modrm mov
BF      movsx Reg Mem16 -       modrm mov
C0      xadd Mem Reg -          byte modrm lock srcwrite
C1      xadd Mem Reg -          modrm lock srcwrite
C3m     movnti Mem Reg -        no16 mov
C7/1m   cmpxchg8b Mem64 - -     lock pt
F3:C7/7r rdpid Mem - -          op3264 ud
C8+8    bswap Reg - -
66:E7   movntdq Mem Reg -       mov sse
"""

MAP_38: Final = """
NP:F0m  movbe Reg Mem -         mov ud
66:F0m  movbe Reg Mem -         mov ud movbe66
NP:F1m  movbe Mem Reg -         mov ud
66:F1m  movbe Mem Reg -         mov ud movbe66
"""


def regular_lines() -> list[str]:
    """The lines of the one-byte map that follow a pattern: the ALU, the shifts, and the undefined MOVs."""
    lines: list[str] = []
    for number in range(8):
        name = _ALU[number]
        write = "nowrite" if name == "cmp" else ""
        table = "pt" if name in ("or", "and") else ""
        lock = "" if name == "cmp" else "lock"
        base = 8 * number
        for odd, byte in ((0, "byte"), (1, "")):
            lines.append(f"{base + odd:02X} {name} Mem Reg - modrm {byte} {write} {lock} {table}")
            lines.append(f"{base + 2 + odd:02X} {name} Reg Mem - modrm {byte} {write} {table}")
            lines.append(f"{base + 4 + odd:02X} {name} Acc Imm - {byte} {write} {table}")
            lines.append(f"{0x80 + odd:02X}/{number} {name} Mem Imm - {byte} {write} {lock} {table}")
            shift = _SHIFTS[number]
            lines.append(f"{0xC0 + odd:02X}/{number} {shift} Mem - ImmB {byte}")
            lines.append(f"{0xD0 + odd:02X}/{number} {shift} Mem - One {byte}")
            lines.append(f"{0xD2 + odd:02X}/{number} {shift} Mem - CL {byte}")
            if number:
                lines.append(f"{0xC6 + odd:02X}/{number} - - - - {byte} undef")
        lines.append(f"82/{number} {name} Mem Imm - byte no64 {write} {lock} {table}")
        lines.append(f"83/{number} {name} Mem ImmB - {write} {lock} {table}")
    return lines
