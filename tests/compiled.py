"""Compile the kernels for a GPU that this machine lacks, and report registers, spills and load widths.

    python -m tests.compiled --shape 2 256 65 129 19 --dtype bf16 --layout nchw --capability 90 --with num_warps=8

calls the launchers on the CPU without running a kernel, compiles what they would start as their call specialises it,
and reads the machine code. It needs Linux, and Triton 3.6 or newer.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LAYOUTS = ["nchw", "channels-last", "crop"]
NUMBERS = ["warps", "stages", "registers", "spilled", "shared", "programs"]
CALLS = ["add_up", "spread", "multiply", "bilinear", "area"]


@contextlib.contextmanager
def recorded(changed):
    """The launches of the block: kernel, arguments and keywords, some of them changed; nothing runs."""
    import triton

    launches = []
    run = triton.JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs | changed))

    triton.JITFunction.run = record
    try:
        yield launches
    finally:
        triton.JITFunction.run = run


def specialised(launch, capability):
    """The options and the ASTSource arguments that Triton's own binder makes of a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    kernel, args, kwargs = launch
    backend = make_backend(GPUTarget("cuda", capability, 32))
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialisation, left = binder(*args, **kwargs)
    return kernel._pack_args(backend, kwargs, arguments, specialisation, left)


def call(name, shape, dtype="float32", layout="nchw", labels="int64", per_image=False, ignore_index=255):
    """Call the launcher `name` as features `[B, C, h, w]` of K classes would, `shape` being those five sizes."""
    import torch

    kernels = importlib.import_module("semshift._pooling_triton")
    batch, channels, height, width, num_classes = shape
    # Memory that is never touched costs nothing.
    options = {"dtype": getattr(torch, DTYPES[dtype])}
    if layout == "crop":
        features = torch.empty(batch, channels, height + 3, width + 3, **options)[:, :, 1:-2, 1:-2]
    elif layout == "channels-last":
        features = torch.empty(batch, height, width, channels, **options).movedim(-1, 1)
    else:
        features = torch.empty(batch, channels, height, width, **options)
    marks = torch.zeros(batch, height, width, dtype=getattr(torch, labels))
    if name == "add_up":
        kernels.add_up(features, marks, num_classes, ignore_index, per_image)
    elif name == "spread":
        rows = torch.empty(*([batch] if per_image else []), num_classes, channels, **options)
        kernels.spread(rows, marks, num_classes, ignore_index, per_image, layout == "channels-last")
    elif name == "multiply":
        kernels.multiply(features.flatten(2), torch.empty(batch, num_classes, height * width))
    else:
        shares = importlib.import_module("semshift._label_triton")
        marks = torch.zeros(batch, 512, 1024, dtype=marks.dtype)
        shares.share_out(marks, height, width, num_classes, name, False, ignore_index)


def compiled(launch, capability, full=False):
    """The kernel of a launch, compiled for this capability, with the figures read from it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch[0]
    options, signature, constants, attributes = specialised(launch, capability)
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    pointers = {place: name for place, name in enumerate(names) if signature[name].startswith("*")}
    reading = {
        "kernel": kernel.__name__,
        "capability": capability,
        "warps": options.num_warps,
        "stages": options.num_stages,
        "constants": {kernel.arg_names[place[0]]: str(value) for place, value in constants.items()},
        "shared": made.metadata.shared,
        **usage(made.asm["cubin"]),
        **accesses(made.asm["ptx"], pointers),
    }
    reading["programs"] = programs(reading)
    # A listing takes a third of a second.
    return reading | (listing(made.asm["cubin"]) if full or reading["spilled"] else {})


def programs(reading):
    """How many programs a multiprocessor holds at once: by its 65,536 registers, its shared memory and its 64 warps."""
    registers = -(-reading["registers"] // 8) * 8 * 32 * reading["warps"]
    memory = (164 if reading["capability"] < 90 else 228) * 1024
    return min(65536 // registers, memory // (reading["shared"] + 1024), 64 // reading["warps"], 32)


def dumped(cubin, flag):
    """Output of cuobjdump, which comes with Triton, for machine code."""
    tool = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin):
    """Registers per thread, and bytes of the thread's stack, which holds spilled registers."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", dumped(cubin, "-res-usage"))
    return {"registers": int(found[1]), "spilled": int(found[2])}


def listing(cubin):
    """How many instructions there are, in all and in the main loop, and which."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", dumped(cubin, "-sass"), re.M)
    place = {int(address, 16): index for index, (address, _) in enumerate(found)}
    instructions = [what for _, what in found]
    loops = []
    for index, what in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", what)
        if jump and place[int(jump[1], 16)] < index:
            loops.append((place[int(jump[1], 16)], index + 1))
    start, stop = main_loop(instructions, loops, r"\b\w*MMA\b", r"\b(LDG|STG|LDGSTS|ATOMG|REDG?)\b", r"\bLDGSTS\b")
    kinds = collections.Counter(re.search(r"^(?:@\S+\s+)?(\w+)", what)[1] for what in instructions[start:stop])
    return {"instructions": len(instructions), "loop": stop - start, "kinds": dict(kinds.most_common())}


def accesses(ptx, pointers):
    """Widths in bits of the accesses to each argument, in the main loop ("inside") and in the whole kernel."""
    statements = [line.strip() for line in re.split(r"[;\n]", re.sub(r"//.*", "", ptx)) if line.strip()]
    labels = {line[:-1]: index for index, line in enumerate(statements) if re.fullmatch(r"[$\w]+:", line)}
    loops = []
    for index, line in enumerate(statements):
        jump = re.search(r"\bbra(?:\.uni)?\s+([$\w]+)", line)
        if jump and labels.get(jump[1], index) < index:
            loops.append((labels[jump[1]], index + 1))
    product = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
    memory = r"\b(ld|st|atom|red)\.\S*global|cp\.async\.c"
    start, stop = main_loop(statements, loops, product, memory, r"\bcp\.async\.c")
    origin = origins(statements, pointers)
    products = sum(bool(re.search(product, line)) for line in statements[start:stop])
    found = {"products": products, "inside": {}, "everywhere": {}}
    for index, line in enumerate(statements):
        kind, width, register = access(line)
        if kind is None:
            continue
        for name in origin.get(register, {"unknown"}):
            for part in ["everywhere"] + ["inside"] * (start <= index < stop):
                counts = found[part].setdefault(f"{kind} {name}", {})
                counts[str(width)] = counts.get(str(width), 0) + 1
    return found


def access(line):
    """The kind, the width in bits and the address register of an access to global memory."""
    line = re.sub(r"^@!?%p\d+\s+", "", line)
    copy = re.match(r"cp\.async\.c[ag]\.\S+\s+\[[^]]*\],\s*\[\s*(%\w+)[^]]*\],\s*(\w+)", line)
    if copy:
        return "copy", int(copy[2], 0) * 8, copy[1]
    operation = re.match(r"(ld|st|atom|red)\.(\S*global\S*)\s", line)
    address = re.search(r"\[\s*(%\w+)", line)
    if operation is None or address is None:
        return None, 0, ""
    vector = re.search(r"\.v(\d)", operation[2])
    bits = re.findall(r"\.[a-z]+(\d+)(?:x(\d))?\b", operation[2])[-1]
    kind = {"ld": "load", "st": "store"}.get(operation[1], "atomic")
    return kind, int(bits[0]) * int(bits[1] or 1) * int(vector[1] if vector else 1), address[1]


def origins(statements, pointers):
    """For each register, the arguments that the address in it may come from; those from shared memory are unknown."""
    origin = {}
    moves = []
    for line in statements:
        parts = re.match(r"(?:@!?%p\d+\s+)?([\w.:]+)\s+(\{[^}]*\}|[^,\[]+?)\s*,\s*(.*)", line)
        if parts is None:
            continue
        to = re.findall(r"%\w+", parts[2])
        parameter = re.search(r"_param_(\d+)\]", parts[3])
        if parts[1].startswith("ld.param") and parameter:
            if int(parameter[1]) in pointers:
                origin[to[0]] = {pointers[int(parameter[1])]}
        elif not re.match(r"ld\.|atom\.|setp", parts[1]):
            moves.append((to, re.findall(r"%\w+", parts[3])))
    changed = True
    while changed:
        changed = False
        for to, sources in moves:
            known = set().union(*(origin.get(source, set()) for source in sources))
            for register in to:
                if not known <= origin.setdefault(register, set()):
                    origin[register] |= known
                    changed = True
    return {register: names for register, names in origin.items() if names}


def main_loop(instructions, loops, product, memory, copy):
    """Where the main loop starts and stops; without any loop, all instructions.

    It is the innermost one that multiplies; of several, one whose loads are pipelined, with the fewest instructions for
    each product. Where none multiplies, it is the one that reaches memory most often.
    """

    def count(pattern, loop):
        return sum(bool(re.search(pattern, one)) for one in instructions[loop[0] : loop[1]])

    for pattern in (product, memory):
        holding = {loop: count(pattern, loop) for loop in loops if count(pattern, loop)}
        innermost = [
            one for one in holding if not any(one != it and one[0] <= it[0] and it[1] <= one[1] for it in holding)
        ]
        if innermost and pattern == product:
            return min(innermost, key=lambda one: (not count(copy, one), (one[1] - one[0]) / holding[one]))
        if innermost:
            return max(innermost, key=holding.get)
    return 0, len(instructions)


_launches = []


def _one(task):
    place, capability, full = task
    try:
        return compiled(_launches[place], capability, full)
    except Exception as error:
        return {
            "kernel": _launches[place][0].__name__,
            "capability": capability,
            "failed": f"{type(error).__name__}: {str(error)[-500:]}",
        }


def readings(cases, capabilities, changed, full=False):
    """A reading for each different kernel that the cases start, with the cases that start it."""
    with recorded(changed) as launches:
        started = []
        for case in cases:
            before = len(launches)
            call(**case)
            started += [case] * (len(launches) - before)
    owners = {}
    for place, launch in enumerate(launches):
        for capability in capabilities:
            key = (launch[0].__name__, capability, str(specialised(launch, capability)))
            owners.setdefault(key, (place, []))[1].append(started[place])
    _launches[:] = launches
    tasks = [(place, key[1], full) for key, (place, _) in owners.items()]
    # Forked, so that tensors need not travel; nothing has started threads here.
    forked = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count(), len(tasks) or 1), forked) as pool:
        found = list(pool.map(_one, tasks))
    return [{**one, "cases": owned} for one, (_, owned) in zip(found, owners.values())]


def show(reading):
    print(f"{reading['kernel']} sm_{reading['capability']}", end=": ")
    if "failed" in reading:
        print("FAILED", reading["failed"])
        return
    print(", ".join(f"{name} {reading[name]}" for name in NUMBERS))
    print("  constants:", " ".join(f"{name}={value}" for name, value in reading["constants"].items()))
    kinds = ", ".join(f"{name} {count}" for name, count in reading["kinds"].items())
    print(f"  main loop: {reading['loop']} of {reading['instructions']} instructions: {kinds}")
    for part in ("inside", "everywhere"):
        widths = [f"{name} {' '.join(f'{n} x {w}' for w, n in by.items())}" for name, by in reading[part].items()]
        print(
            f"  {'in the main loop' if part == 'inside' else 'in all'} (number x bits):", "; ".join(widths) or "nothing"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=5, type=int, metavar=("B", "C", "h", "w", "K"))
    parser.add_argument("--call", default="add_up", choices=CALLS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--layout", default="nchw", choices=LAYOUTS)
    parser.add_argument("--labels", default="int64", choices=["int64", "uint8", "int32"])
    parser.add_argument("--ignore-index", type=int, default=255)
    parser.add_argument("--per-image", action="store_true")
    parser.add_argument("--capability", nargs="+", type=int, default=[90])
    parser.add_argument("--with", nargs="+", default=[], metavar="NAME=VALUE", help="options of Triton, or constants")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    if options.shape is None:
        # For the tests: cases and capabilities in, readings out.
        print(json.dumps(readings(**json.load(sys.stdin))))
        return
    names = ("shape", "dtype", "layout", "labels", "ignore_index", "per_image")
    case = {"name": options.call} | {name: getattr(options, name) for name in names}
    changed = {name: json.loads(value) for name, value in (one.split("=") for one in vars(options)["with"])}
    for reading in readings([case], options.capability, changed, full=True):
        show(reading)


if __name__ == "__main__":
    main()
