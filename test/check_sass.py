#!/usr/bin/env python3
"""What the machine code of shortcut_cuda.cu must keep, without a GPU:

    python3 test/check_sass.py FILE.o      (as nvcc made it, with code for sm_90a)

1. wgmma: each product is there, its descriptors are in uniform registers, and between a product and
   its wait nothing touches its accumulators or writes the registers of its A.
2. No kernel spills, but for those named below.
3. Registers leave room for as many blocks on a processor as the code counts on.
4. Kernels that memory should bound have few instructions for each byte that they read or write.

Limits are what there was (CUDA 13.0) and a tenth.
"""
import os, re, shutil, subprocess, sys

# (kernel, template arguments): HGMMAs, instructions of the loop that holds them, R2UR in it
WGMMA = {('attention_kernel', '128,1'): (24, 910, 0),
         ('attention_backward_kernel', '128,128,2,1'): (32, 1270, 2)}
SPILLS = {('sm_89', 'attention_backward_kernel', '128,128,2,0'),  # never chosen there
          ('sm_90', 'attention_backward_kernel', '128,128,2,0'),  # 12 bytes, wgmma is used
          ('sm_120', 'attention_backward_kernel', '128,128,2,0')}  # 8 bytes
# threads of a block, blocks that a processor should hold; others: 256 threads, 4 blocks
BLOCKS = {'attention_kernel': (128, 2), 'attention_backward_kernel': (256, 1)}
# instructions for each byte that they access, 8 values a thread
DENSITY = {('norm_rope_kernel', '8'): 2.6, ('norm_rope_backward_kernel', '8'): 2.8,
           ('quantize_kernel', '8'): 3.7, ('scale_kernel', '8'): 4.8, ('convert_kernel', '8'): 3.5,
           ('multiply_kernel', '8'): 1.3, ('blend_kernel', '8'): 4,
           ('gated_residual_kernel', '8'): 4, ('gated_residual_backward_kernel', '8'): 3.3,
           ('ln_modulate_kernel', '8'): 8.3, ('ln_modulate_backward_kernel', '8'): 10.3,
           ('layer_norm_kernel', '8'): 3.8, ('group_norm_kernel', '8'): 13,
           ('im2col_kernel', '8'): 6.9, ('few_rows_kernel', ''): 5.1, ('update_kernel', ''): 4.8}


def tool():
    folder = os.path.dirname(os.path.realpath(shutil.which('nvcc') or ''))
    return shutil.which('cuobjdump') or shutil.which(os.path.join(folder, 'cuobjdump'))


def kernel(mangled):
    """'_Z11copy_kernelILi8EEv...': ('copy_kernel', '8')"""
    length = re.match(r'_Z(\d+)', mangled)
    end = length.end() + int(length[1])
    arguments = re.match(r'I((?:L[a-z]\d+E)+)|', mangled[end:])[1] or ''
    return mangled[length.end():end], ','.join(re.findall(r'L[a-z](\d+)E', arguments))


def functions(dump):
    """Of each chip and mangled kernel the instructions, (address, text)."""
    chip, found = None, {}
    for line in dump.splitlines():
        if m := re.match(r'arch = (sm_\d+)|\s+code for (sm_\d+)', line): chip = m[1] or m[2]
        elif m := re.search(r'Function : (\S+)', line): code = found[chip, m[1]] = []
        elif (m := re.match(r'\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;', line)) and m[2] != 'NOP':
            code.append((int(m[1], 16), m[2]))
    return found


def main_loop(code):
    """The innermost loop that holds all HGMMAs, and what comes after it."""
    products = [at for at, text in code if 'HGMMA' in text]
    loops = [(int(m[1], 16), at) for at, text in code
             if (m := re.search(r'BRA.*?0x([0-9a-f]+)', text)) and int(m[1], 16) < at]
    first, last = min((l for l in loops if l[0] <= products[0] and l[1] >= products[-1]),
                      key=lambda l: l[1] - l[0])
    return [c for c in code if first <= c[0] <= last], [c for c in code if c[0] > last]


def registers(operation, arguments):
    """The registers that an instruction touches, and those of them that it writes."""
    width = 4 if '.128' in operation else 2 if re.search(r'\.64|WIDE|CS2R', operation) else 1
    touched = set()
    for m in re.finditer(r'\bR(\d+)(\.64)?', re.sub(r'\[[^]]*\]', '', arguments)):
        touched |= set(range(int(m[1]), int(m[1]) + width))
    for address in re.findall(r'\[([^]]*)\]', arguments):
        for m in re.finditer(r'\bR(\d+)(\.64)?', address):
            touched |= set(range(int(m[1]), int(m[1]) + (2 if m[2] else 1)))
    result = re.match(r'R(\d+)', arguments)
    return touched, set(range(int(result[1]), int(result[1]) + width)) if result else set()


def hazards(code):
    """What touches the registers of a product under way: in the loop, twice, and what follows."""
    loop, tail = main_loop(code)
    groups, group, found = [], [set(), set()], []  # accumulators, A's registers
    for at, text in loop + loop + tail:
        operation, arguments = re.match(r'(?:@!?U?P\w+ )?(\S+)\s*(.*)', text).groups()
        if operation.startswith('HGMMA'):
            operands = [x.strip() for x in arguments.split(',')]
            columns = int(re.search(r'64x(\d+)x16', operation)[1])
            d = int(operands[0][1:])
            group[0] |= set(range(d, d + columns // 2))
            if m := re.match(r'R(\d+)', operands[1]):
                group[1] |= set(range(int(m[1]), int(m[1]) + 4))
            if 'gsb0' in arguments: groups, group = groups + [group], [set(), set()]
        elif m := re.search(r'WARPGROUP.DEPBAR.LE gsb0, 0x(\d)', text):
            groups = groups[len(groups) - int(m[1]):] if int(m[1]) else []
        elif 'WARPGROUP' not in text:
            touched, written = registers(operation, arguments)
            for accumulators, a in groups + [group]:
                if touched & accumulators or written & a: found.append(f'{at:#x} {text}')
    return found + ['a product that is not waited for'] * len(groups)


def density(code):  # of one thread's accesses
    size = {'128': 16, '64': 8, 'U16': 2, 'S16': 2, 'U8': 1}
    moved = sum(next((size[part] for part in m[1].split('.') if part in size), 4)
                for _, text in code if (m := re.search(r'\b(?:LDG|STG)(\S*)', text)))
    return len(code) / max(moved, 1)


def main():
    if not tool(): return print('check_sass: skipped: no cuobjdump')
    run = lambda option: subprocess.run([tool(), option, sys.argv[1]], check=True, text=True,
                                        capture_output=True).stdout
    code, used, seen, checks = functions(run('-sass')), {}, set(), []
    def check(right, what):
        checks.append(right)
        if not right: print('check_sass: failed:', what)
    for line in run('--dump-resource-usage').splitlines():
        if m := re.match(r'arch = (sm_\d+)', line): chip = m[1]
        elif m := re.search(r'Function (\S+):', line): name = m[1]
        elif m := re.search(r'REG:(\d+)', line): used[chip, name] = int(m[1])
    for (chip, mangled), body in code.items():
        key = kernel(mangled)
        name = f'{chip} {key[0]}<{key[1]}>'
        spills = sum(bool(re.search(r'\b(STL|LDL)\b', text)) for _, text in body)
        check(spills == 0 or (chip, *key) in SPILLS, f'{name}: {spills} spills')
        threads, blocks = BLOCKS.get(key[0], (256, 4))
        limit = min(255, 65536 // (threads * blocks) // 8 * 8)
        check(used[chip, mangled] <= limit, f'{name}: {used[chip, mangled]} registers, not {limit}')
        if chip != 'sm_90': continue
        seen.add(key)
        if key in DENSITY:
            check(density(body) <= DENSITY[key], f'{name}: {density(body):.2f} instructions a byte')
        if key not in WGMMA: continue
        products, length, moves = WGMMA[key]
        count = sum('HGMMA' in text for _, text in body)
        check(count == products, f'{name}: {count} HGMMA, not {products}')
        if not count: continue
        loop = main_loop(body)[0]
        check(len(loop) <= length, f'{name}: {len(loop)} instructions in its loop, not {length}')
        count = sum('R2UR' in text for _, text in loop)
        check(count <= moves, f'{name}: {count} R2UR in its loop, not {moves}')
        for hazard in hazards(body) or [None]: check(hazard is None, f'{name}: under way: {hazard}')
    for key in (WGMMA.keys() | DENSITY.keys()) - seen: check(False, f'no kernel {key} for sm_90')
    print(f'{sum(checks)} passed, {len(checks) - sum(checks)} failed')
    sys.exit(not all(checks))


if __name__ == '__main__': main()
