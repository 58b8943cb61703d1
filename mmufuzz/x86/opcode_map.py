"""The supported encodings as text: one line a form, by opcode map (SDM vol. 2, appendix A and chapters 3 to 6).

A line is ``[prefix:]opcode[+count][/extension] mnemonic operands flags``:

* ``prefix`` (66, F2, F3, or NP for none of them) is a mandatory prefix; without it the three are modifiers.
* ``+8`` puts a register, ``+16`` a condition into the low bits of the opcode, or of a ModRM byte given in full.
* ``extension`` is ModRM.reg in one octal digit, or the whole ModRM byte in two hexadecimal ones.

The first letter of an operand is its addressing method, the rest its size (see ``opcodes.OPERANDS``); flags are in
``opcodes.FLAGS``. Of two lines for one encoding the later one is meant.
"""

from __future__ import annotations

from typing import Final

_ALU: Final = ["add", "or", "adc", "sbb", "and", "sub", "xor", "cmp"]
_SHIFTS: Final = ["rol", "ror", "rcl", "rcr", "shl", "shr", "shl", "sar"]

ONE_BYTE: Final = """
06      push    Sp          stack only32
07      pop     Sp          stack only32
0E      push    Sp          stack only32
16      push    Sp          stack only32
17      pop     Sp          stack only32
1E      push    Sp          stack only32
1F      pop     Sp          stack only32
27      daa                 only32
2F      das                 only32
37      aaa                 only32
3F      aas                 only32
40+8    inc     Zv          only32
48+8    dec     Zv          only32
50+8    push    Zv          stack
58+8    pop     Zv          stack
60      pusha               only32
61      popa                only32
62      bound   Gv Ma       only32
63      arpl    Es Gv       only32
63      movsxd  Gv Ed       only64
68      push    Iz          stack
69      imul    Gv Ev Iz
6A      push    Is          stack
6B      imul    Gv Ev Is
6C      ins                 string byte
6D      ins                 string
6E      outs                string byte
6F      outs                string
70+16   jcc     Jb          near
84      test    Eb Gb
85      test    Ev Gv
86      xchg    Eb Gb       lock
87      xchg    Ev Gv       lock
88      mov     Eb Gb
89      mov     Ev Gv
8A      mov     Gb Eb
8B      mov     Gv Ev
8C      mov     Es Sw
8D      lea     Gv M
8E      mov     Sw Es
8F/0    pop     Ev          stack
90+8    xchg    Zv Av
90      nop
98      cbw
99      cwd
9A      callf   Ap          only32
9B      wait
9C      pushf               stack
9D      popf                stack
9E      sahf
9F      lahf
A0      mov     Ab Ob
A1      mov     Av Ov
A2      mov     Ob Ab
A3      mov     Ov Av
A4      movs                string byte
A5      movs                string
A6      cmps                string byte
A7      cmps                string
A8      test    Ab Ib
A9      test    Av Iz
AA      stos                string byte
AB      stos                string
AC      lods                string byte
AD      lods                string
AE      scas                string byte
AF      scas                string
B0+8    mov     Zb Ib
B8+8    mov     Zv Iv
C2      ret     Iw          near
C3      ret                 near
C4      les     Gv Mp       only32
C5      lds     Gv Mp       only32
C6/0    mov     Eb Ib
C7/0    mov     Ev Iz
C8      enter   Iw Ib       stack
C9      leave               stack
CA      retf    Iw
CB      retf
CC      int3
CD      int     Ib
CE      into                only32
CF      iret
D4      aam     Ib          only32
D5      aad     Ib          only32
D6      salc                only32
D7      xlat
E0      loopne  Jb          near
E1      loope   Jb          near
E2      loop    Jb          near
E3      jcxz    Jb          near
E4      in      Ab Ib
E5      in      Az Ib
E6      out     Ib Ab
E7      out     Ib Az
E8      call    Jz          near
E9      jmp     Jz          near
EA      jmpf    Ap          only32
EB      jmp     Jb          near
EC      in      Ab DX
ED      in      Az DX
EE      out     DX Ab
EF      out     DX Az
F1      int1
F4      hlt
F5      cmc
F6/0    test    Eb Ib
F6/1    test    Eb Ib
F6/2    not     Eb          lock
F6/3    neg     Eb          lock
F6/4    mul     Eb
F6/5    imul    Eb
F6/6    div     Eb
F6/7    idiv    Eb
F7/0    test    Ev Iz
F7/1    test    Ev Iz
F7/2    not     Ev          lock
F7/3    neg     Ev          lock
F7/4    mul     Ev
F7/5    imul    Ev
F7/6    div     Ev
F7/7    idiv    Ev
F8      clc
F9      stc
FA      cli
FB      sti
FC      cld
FD      std
FE/0    inc     Eb          lock
FE/1    dec     Eb          lock
FF/0    inc     Ev          lock
FF/1    dec     Ev          lock
FF/2    call    Ev          near
FF/3    callf   Mp
FF/4    jmp     Ev          near
FF/5    jmpf    Mp
FF/6    push    Ev          stack
"""

X87: Final = """
D9/0    fld     M4
D9/2    fst     M4
D9/3    fstp    M4
D9/4    fldenv  M
D9/5    fldcw   M2
D9/6    fnstenv M
D9/7    fnstcw  M2
D9/C0+8 fld     STi
D9/C8+8 fxch    STi
D9/D0   fnop
D9/E0   fchs
D9/E1   fabs
D9/E8   fld1
D9/E9   fldl2t
D9/EA   fldl2e
D9/EB   fldpi
D9/EC   fldlg2
D9/ED   fldln2
D9/EE   fldz
D9/F6   fdecstp
D9/F7   fincstp
DB/0    fild    M4
DB/1    fisttp  M4
DB/2    fist    M4
DB/3    fistp   M4
DB/5    fld     M10
DB/7    fstp    M10
DB/E2   fnclex
DB/E3   fninit
DD/0    fld     M8
DD/1    fisttp  M8
DD/2    fst     M8
DD/3    fstp    M8
DD/4    frstor  M
DD/6    fnsave  M
DD/7    fnstsw  M2
DD/C0+8 ffree   STi
DD/C8+8 fxch    STi
DD/D0+8 fst     STi
DD/D8+8 fstp    STi
DF/0    fild    M2
DF/1    fisttp  M2
DF/2    fist    M2
DF/3    fistp   M2
DF/4    fbld    M10
DF/5    fild    M8
DF/6    fbstp   M10
DF/7    fistp   M8
DF/C8+8 fxch    STi
DF/D0+8 fstp    STi
DF/D8+8 fstp    STi
DF/E0   fnstsw  Aw
"""

TWO_BYTE: Final = """
00/0    sldt    Es
00/1    str     Es
00/2    lldt    Es
00/3    ltr     Es
00/4    verr    Es
00/5    verw    Es
01/0    sgdt    Mt
01/1    sidt    Mt
01/2    lgdt    Mt
01/3    lidt    Mt
01/4    smsw    Es
01/6    lmsw    Es
01/7    invlpg  M           mem
NP:01/C1 vmcall
NP:01/CA clac
NP:01/CB stac
NP:01/D0 xgetbv
NP:01/D1 xsetbv
NP:01/D9 vmmcall
NP:01/EE rdpkru
NP:01/EF wrpkru
01/F8   swapgs              only64
01/F9   rdtscp
02      lar     Gv Es
03      lsl     Gv Es
05      syscall             only64
06      clts
07      sysret              only64
08      invd
09      wbinvd
0B      ud2
1F      nop     Nv
0D      nop     Nv
18      nop     Nv
19      nop     Nv
1C      nop     Nv
1D      nop     Nv
1E      nop     Nv
20      movcr   Rn Cn
21      movdr   Rn Dn
22      movcr   Cn Rn
23      movdr   Dn Rn
30      wrmsr
31      rdtsc
32      rdmsr
33      rdpmc
34      sysenter
35      sysexit
40+16   cmovcc  Gv Ev
80+16   jcc     Jz          near
90+16   setcc   Eb
A0      push    Sp          stack
A1      pop     Sp          stack
A2      cpuid
A3      bt      Ev Gv
A4      shld    Ev Gv Ib
A5      shld    Ev Gv CL
A8      push    Sp          stack
A9      pop     Sp          stack
AB      bts     Ev Gv       lock
AC      shrd    Ev Gv Ib
AD      shrd    Ev Gv CL
NP:AE/0 fxsave  M512
NP:AE/1 fxrstor M512
NP:AE/2 ldmxcsr M4
NP:AE/3 stmxcsr M4
NP:AE/4 xsave   Mx
NP:AE/5 xrstor  Mx
NP:AE/6 xsaveopt Mx
NP:AE/7 clflush M1
66:AE/6 clwb    M1
66:AE/7 clflushopt M1
NP:AE/5 lfence              reg
NP:AE/6 mfence              reg
NP:AE/7 sfence              reg
F3:AE/0 rdfsbase Ey         reg only64
F3:AE/1 rdgsbase Ey         reg only64
F3:AE/2 wrfsbase Ey         reg only64
F3:AE/3 wrgsbase Ey         reg only64
AF      imul    Gv Ev
B0      cmpxchg Eb Gb       lock
B1      cmpxchg Ev Gv       lock
B2      lss     Gv Mp
B3      btr     Ev Gv       lock
B4      lfs     Gv Mp
B5      lgs     Gv Mp
B6      movzx   Gv Eb
B7      movzx   Gv Ew
F3:B8   popcnt  Gv Ev
BA/4    bt      Ev Ib
BA/5    bts     Ev Ib       lock
BA/6    btr     Ev Ib       lock
BA/7    btc     Ev Ib       lock
BB      btc     Ev Gv       lock
BC      bsf     Gv Ev
F3:BC   tzcnt   Gv Ev
BD      bsr     Gv Ev
F3:BD   lzcnt   Gv Ev
BE      movsx   Gv Eb
BF      movsx   Gv Ew
C0      xadd    Eb Gb       lock
C1      xadd    Ev Gv       lock
NP:C3   movnti  My Gy
C7/1    cmpxchg8b  M8       lock narrow
C7/1    cmpxchg16b M16      lock wide
NP:C7/4 xsavec  Mx
F3:C7/7 rdpid   Rn          reg
C8+8    bswap   Zv
"""

SSE: Final = """
NP:10   movups  V16 W16
66:10   movupd  V16 W16
F3:10   movss   V4 W4
F2:10   movsd   V8 W8
NP:11   movups  W16 V16
66:11   movupd  W16 V16
F3:11   movss   W4 V4
F2:11   movsd   W8 V8
NP:12   movlps  V8 M8
NP:12   movhlps V8 W8       reg
66:12   movlpd  V8 M8
F3:12   movsldup V16 W16
F2:12   movddup V16 W8
NP:13   movlps  M8 V8
66:13   movlpd  M8 V8
NP:16   movhps  V8 M8
NP:16   movlhps V8 W8       reg
66:16   movhpd  V8 M8
F3:16   movshdup V16 W16
NP:17   movhps  M8 V8
66:17   movhpd  M8 V8
NP:28   movaps  V16 W16
66:28   movapd  V16 W16
NP:29   movaps  W16 V16
66:29   movapd  W16 V16
NP:2B   movntps M16 V16
66:2B   movntpd M16 V16
NP:6E   movd    P4 Ey       narrow
NP:6E   movq    P8 Ey       wide
66:6E   movd    V4 Ey       narrow
66:6E   movq    V8 Ey       wide
NP:6F   movq    P8 Q8
66:6F   movdqa  V16 W16
F3:6F   movdqu  V16 W16
NP:77   emms
NP:7E   movd    Ey P4       narrow
NP:7E   movq    Ey P8       wide
66:7E   movd    Ey V4       narrow
66:7E   movq    Ey V8       wide
F3:7E   movq    V8 W8
NP:7F   movq    Q8 P8
66:7F   movdqa  W16 V16
F3:7F   movdqu  W16 V16
66:D6   movq    W8 V8
F3:D6   movq2dq V8 Q8       reg
F2:D6   movdq2q P8 W8       reg
NP:E7   movntq  M8 P8
66:E7   movntdq M16 V16
F2:F0   lddqu   V16 M16
NP:F7   maskmovq P8 Q8      reg
66:F7   maskmovdqu V16 W16  reg
"""

MAP_38: Final = """
66:82   invpcid Gn M16
NP:F0   movbe   Gv Mv
66:F0   movbe   Gv Mv
NP:F1   movbe   Mv Gv
66:F1   movbe   Mv Gv
F2:F0   crc32   Gy Eb
F2:F1   crc32   Gy Ev
66:F6   adcx    Gy Ey
F3:F6   adox    Gy Ey
NP:F9   movdiri My Gy
"""

VEX_0F: Final = """
NP:10   vmovups Vx Wx
66:10   vmovupd Vx Wx
F3:10   vmovss  V4 M4
F3:10   vmovss  V4 H16 W4   reg
F2:10   vmovsd  V8 M8
F2:10   vmovsd  V8 H16 W8   reg
NP:11   vmovups Wx Vx
66:11   vmovupd Wx Vx
F3:11   vmovss  M4 V4
F3:11   vmovss  W4 H16 V4   reg
F2:11   vmovsd  M8 V8
F2:11   vmovsd  W8 H16 V8   reg
NP:12   vmovlps V8 H16 M8   l0
NP:12   vmovhlps V8 H16 W8  l0 reg
66:12   vmovlpd V8 H16 M8   l0
F3:12   vmovsldup Vx Wx
F2:12   vmovddup V16 W8     l0
F2:12   vmovddup V32 W32    l1
NP:13   vmovlps M8 V8       l0
66:13   vmovlpd M8 V8       l0
NP:16   vmovhps V8 H16 M8   l0
NP:16   vmovlhps V8 H16 W8  l0 reg
66:16   vmovhpd V8 H16 M8   l0
F3:16   vmovshdup Vx Wx
NP:17   vmovhps M8 V8       l0
66:17   vmovhpd M8 V8       l0
NP:28   vmovaps Vx Wx
66:28   vmovapd Vx Wx
NP:29   vmovaps Wx Vx
66:29   vmovapd Wx Vx
NP:2B   vmovntps Mx Vx
66:2B   vmovntpd Mx Vx
66:6E   vmovd   V4 Ey       l0 narrow
66:6E   vmovq   V8 Ey       l0 wide
66:6F   vmovdqa Vx Wx
F3:6F   vmovdqu Vx Wx
NP:77   vzeroupper          l0
NP:77   vzeroall            l1
66:7E   vmovd   Ey V4       l0 narrow
66:7E   vmovq   Ey V8       l0 wide
F3:7E   vmovq   V8 W8       l0
66:7F   vmovdqa Wx Vx
F3:7F   vmovdqu Wx Vx
NP:AE/2 vldmxcsr M4         l0
NP:AE/3 vstmxcsr M4         l0
66:D6   vmovq   W8 V8       l0
66:E7   vmovntdq Mx Vx
F2:F0   vlddqu  Vx Mx
66:F7   vmaskmovdqu V16 W16 l0 reg
"""

VEX_38: Final = """
NP:F2   andn    Gy By Ey    l0
NP:F3/1 blsr    By Ey       l0
NP:F3/2 blsmsk  By Ey       l0
NP:F3/3 blsi    By Ey       l0
NP:F5   bzhi    Gy Ey By    l0
F3:F5   pext    Gy By Ey    l0
F2:F5   pdep    Gy By Ey    l0
F2:F6   mulx    Gy By Ey    l0
NP:F7   bextr   Gy Ey By    l0
66:F7   shlx    Gy Ey By    l0
F3:F7   sarx    Gy Ey By    l0
F2:F7   shrx    Gy Ey By    l0
"""

VEX_3A: Final = """
F2:F0   rorx    Gy Ey Ib    l0
"""


def regular_lines() -> list[str]:
    """The lines of the one-byte map that follow a pattern: the ALU and the shift groups."""
    lines: list[str] = []
    for number in range(8):
        name = _ALU[number]
        lock = "" if name == "cmp" else "lock"
        base = number * 8
        lines.append(f"{base:02X} {name} Eb Gb {lock}")
        lines.append(f"{base + 1:02X} {name} Ev Gv {lock}")
        lines.append(f"{base + 2:02X} {name} Gb Eb")
        lines.append(f"{base + 3:02X} {name} Gv Ev")
        lines.append(f"{base + 4:02X} {name} Ab Ib")
        lines.append(f"{base + 5:02X} {name} Av Iz")
        lines.append(f"80/{number} {name} Eb Ib {lock}")
        lines.append(f"81/{number} {name} Ev Iz {lock}")
        lines.append(f"82/{number} {name} Eb Ib {lock} only32")
        lines.append(f"83/{number} {name} Ev Is {lock}")
        shift = _SHIFTS[number]
        lines.append(f"C0/{number} {shift} Eb Ib")
        lines.append(f"C1/{number} {shift} Ev Ib")
        lines.append(f"D0/{number} {shift} Eb 1")
        lines.append(f"D1/{number} {shift} Ev 1")
        lines.append(f"D2/{number} {shift} Eb CL")
        lines.append(f"D3/{number} {shift} Ev CL")
    return lines
