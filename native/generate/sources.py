"""Writes what the C compiler is given: the manifest, the machine code, and the rules' scalars."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .images import Image
from .table import C_TYPES, LIBRARY, EntryPoint, Row, codecs
from .trace import Symbol, leaf, statements

Tables = Mapping[str, Sequence[Row]]

HEADER = "/* Written by native.generate: do not edit. */\n"


def write(
    images: Sequence[Image], tables: Tables, directory: Path, versions: dict[str, str]
) -> None:
    """Write every file of the build.

    Args:
        images: the compiled table, target by target.
        tables: for each target the rows of the table.
        directory: where to.
        versions: of fusedopt and of Triton, by name.
    """
    blobs = {image.sha256: image.cubin for image in images}
    order = {digest: number for number, digest in enumerate(blobs)}
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for digest, cubin in blobs.items():
        (directory / "images" / f"{digest}.cubin").write_bytes(cubin)
    for old in (directory / "images").iterdir():
        if old.stem not in blobs:
            old.unlink()
    (directory / "images.S").write_text(assembly(order))
    (directory / "manifest.c").write_text(manifest(images, tables, order, versions["fusedopt"]))
    (directory / "rules.c").write_text(rules())
    (directory / "manifest.json").write_text(as_json(images, tables, versions))


def assembly(order: dict[str, int]) -> str:
    """Place each distinct cubin in read-only memory, aligned for the driver."""
    lines = [HEADER, "    .section .rodata"]
    for digest, number in order.items():
        name = f"fusedopt_image_{number}"
        lines += [
            f"    .balign 64\n    .globl {name}\n    .hidden {name}\n    .type {name}, %object",
            f'{name}:\n    .incbin "images/{digest}.cubin"\n    .size {name}, . - {name}',
        ]
    return "\n".join([*lines, '    .section .note.GNU-stack, "", %progbits', ""])


def manifest(images: Sequence[Image], tables: Tables, order: dict[str, int], version: str) -> str:
    """State in C which kernels there are, and for which GPUs."""
    lines = [HEADER, '#include "library.h"', ""]
    lines += [f"extern const unsigned char fusedopt_image_{n}[];" for n in order.values()]
    lines += ["", "const struct kernel library_kernels[] = {"]
    lines += [_kernel(image, tables[image.target][image.row], order) for image in images]
    lines += ["};", f"const size_t library_kernel_count = {len(images)};"]
    lines += [f"const size_t library_image_count = {len(order)};", ""]
    lines += ["const struct target library_targets[] = {"]
    names = list(dict.fromkeys(image.target for image in images))
    for name in names:
        own = [number for number, image in enumerate(images) if image.target == name]
        image = images[own[0]]
        major, minor = image.capability
        cuda = max(images[number].cuda for number in own)
        lines.append(
            f'    {{"{name}", {major}, {minor}, {int(image.exact)}, {cuda}, {own[0]}, {len(own)}}},'
        )
    lines += ["};", f"const size_t library_target_count = {len(names)};"]
    lines += [f'const char library_version[] = "{version}";', ""]
    return "\n".join(lines)


def _kernel(image: Image, row: Row, order: dict[str, int]) -> str:
    assert image.report is not None
    number = order[image.sha256]
    kernel = row.variant.kernel.__name__
    public = [
        _text(f"{image.target} {row.variant.name}"), _text(kernel), _text(row.rule),
        _text(row.option_names), _text(image.target), _text(image.machine),
        *(C_TYPES[kind] for kind in row.types), int(row.aligned),
        row.variant.threads, row.variant.block, image.report.registers, image.report.shared,
        f"fusedopt_image_{number}", len(image.cubin),
    ]  # fmt: skip
    values = ", ".join(map(str, public))
    return f"    {{{{{values}}}, {_bits(row.options)}u, {number}, {image.scratch}}},"


def _bits(options: Sequence[bool]) -> int:
    return sum(int(on) << place for place, on in enumerate(options))


def _text(value: str) -> str:
    return json.dumps(value)


def rules() -> str:
    """State in C the host's half of every entry point: scalars, selection of code, ranges."""
    lines = [HEADER, "#include <float.h>\n#include <math.h>\n\n" + '#include "library.h"', ""]
    lines += ['_Static_assert(FLT_EVAL_METHOD == 0, "double arithmetic must round to double");']
    return "\n".join([*lines, *(entry_point(entry) for entry in LIBRARY)])


def coefficients(entry: EntryPoint, flags: dict[str, bool]) -> list[str]:
    """State the rule's coefficients in C for one value of every flag."""
    step = leaf("step") if entry.counts_steps else _NoStep("")
    results = entry.rule.coefficients(entry.group(flags), step)
    if len(results) != entry.rule.n_coefficients:
        raise ValueError(f"{entry.rule.name} gave {len(results)} coefficients")
    lines = statements(results, [f"row[{i}]" for i in range(len(results))])
    names = {f"row[{i}] ": name for i, name in enumerate(entry.rule.coefficient_names)}
    # A line that is none of a coefficient is of a variable that several of them use.
    named = (
        next((n for start, n in names.items() if line.startswith(start)), "") for line in lines
    )
    return [
        f"{line} /* {name} */" if name else line for line, name in zip(lines, named, strict=True)
    ]


class _NoStep(Symbol):
    def key(self) -> tuple[Any, ...]:
        raise ValueError("the rule reads the step count: the entry point must count steps")


def _options(entry: EntryPoint, flags: dict[str, bool]) -> list[str]:
    """State in C which code a group selects, as a bit for each option."""
    parts = []
    for place, option in enumerate(entry.rule.options(entry.group(flags))):
        if isinstance(option, Symbol):
            (condition,) = statements([option], [f"option{place}"])
            parts.append(f"const unsigned {condition}")
        else:
            parts.append(f"const unsigned option{place} = {int(option)};")
    names = [f"option{place} << {place}" for place in range(len(parts))]
    return [*parts, f"return {' | '.join(names)};"]


def _by_flags(
    entry: EntryPoint, make: Callable[[EntryPoint, dict[str, bool]], list[str]], indent: str
) -> list[str]:
    """Write what depends on flags, with an if where it differs and once where it does not."""

    def tree(chosen: dict[str, bool], flags: Sequence[str], indent: str) -> list[str]:
        if not flags:
            return [indent + line for line in make(entry, chosen)]
        inner = indent + "    "
        on = tree({**chosen, flags[0]: True}, flags[1:], inner)
        off = tree({**chosen, flags[0]: False}, flags[1:], inner)
        if on == off:
            return [line.removeprefix("    ") for line in on]
        condition = f"{indent}if (group->{flags[0]}) {{"
        return [condition, *on, f"{indent}}} else {{", *off, f"{indent}}}"]

    return tree({}, entry.flags, indent)


def entry_point(entry: EntryPoint) -> str:
    """State one entry point in C."""
    name, struct = entry.name, f"fusedopt_{entry.name}"
    group = f"    const {struct} *group = hyper;"
    lines = ["", f"static void {name}_coefficients(const void *hyper, double *row)", "{", group]
    if entry.counts_steps:
        lines.append("    const double step = (double)group->step;")
    lines += [*_by_flags(entry, coefficients, "    "), "}", ""]
    lines += [f"static unsigned {name}_options(const void *hyper)", "{", group]
    lines += [*_by_flags(entry, _options, "    "), "}", "", *_requirements(entry, group)]
    lines += [f"static const struct field {name}_fields[] = {{"]
    for field, kind in entry.fields.items():
        lines.append(f'    {{"{field}", offsetof({struct}, {field}), {kind}}},')
    lines += ["};", "", f"static const struct layout {name}_layouts[] = {{"]
    for options, states in entry.layouts().items():
        slots = ", ".join(map(str, states or (0,)))
        lines.append(f"    {{{_bits(options)}u, {len(states)}, {{{slots}}}}},")
    names = ", ".join(_text(state) for state in entry.states)
    step = f"offsetof({struct}, step)" if entry.counts_steps else "NO_STEP"
    return "\n".join([
        *lines, "};", "", f"const struct entry_point library_{name} = {{",
        f'    "{name}", "{entry.rule.name}", sizeof({struct}), {step},',
        f"    {name}_fields, {len(entry.fields)}, {name}_layouts, {len(entry.layouts())},",
        f"    {{{names}}}, {entry.rule.n_coefficients},",
        f"    {name}_coefficients, {name}_options, {name}_requirements}};", "",
    ])  # fmt: skip


def _requirements(entry: EntryPoint, group: str) -> list[str]:
    """State in C the conditions besides ranges; NULL is returned where they hold."""
    lines = [f"static const char *{entry.name}_requirements(const void *hyper)", "{"]
    lines.append(group if entry.requirements else "    (void)hyper;")
    for requirement in entry.requirements:
        flags = dict.fromkeys(entry.flags, False)
        conditions = requirement.conditions(entry.group(flags))
        for line in statements(conditions, [""] * len(conditions)):
            condition = line.removeprefix(" = ").removesuffix(";")
            lines.append(f"    if (group->{requirement.flag} && !{condition})")
            lines.append(f"        return {_text(requirement.text)};")
    return [*lines, "    return NULL;", "}", ""]


def as_json(images: Sequence[Image], tables: Tables, versions: dict[str, str]) -> str:
    """List the compiled kernels for programs, and for whoever compares two builds."""
    listed = []
    for image in images:
        row, report = tables[image.target][image.row], image.report
        assert report is not None
        listed.append(
            {
                "target": image.target,
                "machine": image.machine,
                "kernel": row.variant.kernel.__name__,
                "name": row.variant.name,
                "rule": row.rule,
                "options": row.option_names,
                "types": list(row.types),
                "aligned": row.aligned,
                "threads": row.variant.threads,
                "block": row.variant.block,
                "registers": report.registers,
                "stack": report.stack,
                "shared": report.shared,
                "bytes": len(image.cubin),
                "sha256": image.sha256,
            }
        )
    return json.dumps({**versions, "codecs": codecs(), "kernels": listed}, indent=2) + "\n"
