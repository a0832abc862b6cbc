"""Checks the arrows between the layers: who may include whom, written how.

    layering.py ROOT         complains about each violation in the tree at ROOT
    layering.py --selftest   shows that each rule complains
"""

import pathlib
import re
import subprocess
import sys
import tempfile

# Arrows point down only. The layers of design: launcher, parallel, kernels and comm.
MAY_INCLUDE = {
    "comm": {"comm"},
    "kernels": {"kernels"},
    "parallel": {"parallel", "kernels", "comm"},
    "launcher": {"launcher", "parallel", "kernels", "comm"},
}
EVERYTHING = {"comm", "kernels", "parallel", "launcher", "tests", "bench"}
MAY_INCLUDE["tests"] = MAY_INCLUDE["bench"] = EVERYTHING

# In parallel/, the run half. Every other file there is the plan half: pure integers, and it links
# neither MPI nor BLAS nor OpenMP.
RUN_HALF = re.compile(r"parallel/(all_reduce|compensate|decoder|engine|envelope|flights|homes|latent_|prefill_plan|ragged_cache|reserved|sealed|served|signature|slot_sums|stats|sums|wire)[^/]*")
NOT_IN_PLAN_HALF = re.compile(r"(omp|cblas|lapacke)\.h")

# Only comm/, and what tests comm/, sees MPI itself.
MPI_FOLDERS = ("comm/", "tests/comm/")

TOP_LEVEL = EVERYTHING | {"CMakeLists.txt", "CMakePresets.json", "README.md"}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]', re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
SOURCES = (".hpp", ".cpp", ".h", ".c", ".inc")


def listed_by_git(root):
    """The files git tracks or would add; None when ROOT is no git checkout."""
    if not (root / ".git").exists():
        return None
    # safe.directory: the checkout may belong to somebody else, as in many containers.
    command = ["git", "-c", "safe.directory=*", "-C", str(root), "ls-files", "-z",
               "--cached", "--others", "--exclude-standard"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sorted({name for name in answer.stdout.split("\0") if name and (root / name).is_file()})


def found_on_disk(root):
    """The files of the six folders, for a tree without git."""
    return sorted(str(path.relative_to(root)) for folder in EVERYTHING
                  for path in (root / folder).rglob("*") if path.is_file())


def is_plan_half(name):
    return name.startswith("parallel/") and not RUN_HALF.match(name)


def check_include(root, name, bracket, target):
    """Yields what is wrong with one include line of the file NAME."""
    here, there = name.split("/")[0], target.split("/")[0]
    if ".." in target.split("/"):
        yield "includes are written from the repository root, without '..'"
    elif bracket == '"' and not (there in EVERYTHING and (root / target).is_file()):
        if target != "mpi.h":
            yield "quoted includes are files of this tree, written from the repository root"
    elif bracket == "<" and there in EVERYTHING and "/" in target:
        yield "files of this tree are included in quotes"
    if there in EVERYTHING and "/" in target and there not in MAY_INCLUDE[here]:
        yield f"{here}/ may not include {there}/"
    if target == "mpi.h" and not name.startswith(MPI_FOLDERS):
        yield "mpi.h belongs to comm/"
    if is_plan_half(name):
        if there == "comm":
            yield "the plan half may not include comm/"
        if RUN_HALF.match(target):
            yield "the plan half may not include the run half"
        if NOT_IN_PLAN_HALF.fullmatch(target):
            yield "the plan half is pure integers"


def check(root, names):
    """All complaints about the files NAMES, each 'file:line: include: reason'."""
    complaints = []
    for top in sorted({name.split("/")[0] for name in names}):
        if top not in TOP_LEVEL and not top.startswith("."):
            complaints.append(f"{top}: does not belong at the top level")
    for name in names:
        if name.split("/")[0] not in EVERYTHING or not name.endswith(SOURCES):
            continue
        text = (root / name).read_text(encoding="utf-8")
        text = COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
        for match in INCLUDE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            for reason in check_include(root, name, match[1], match[2]):
                complaints.append(f"{name}:{line}: {match[2]}: {reason}")
    return complaints


# Of each file, what it holds and the reason that must be given for it; None: no complaint.
SELFTEST = {
    "comm/good.hpp": ("#include <mpi.h>\n", None),
    "kernels/good.hpp": ("#include <omp.h>\n// #include \"comm/good.hpp\"\n", None),
    "kernels/quiet.hpp": ("/*\n#include \"comm/good.hpp\"\n*/\n", None),
    "parallel/engine.hpp": ('#include "comm/good.hpp"\n', None),
    "parallel/plan.hpp": ('#include "kernels/good.hpp"\n', None),
    "launcher/main.cpp": ('#include "parallel/engine.hpp"\n', None),
    "tests/a.cpp": ('#include "tests/b.hpp"\n#include "launcher/x.hpp"\n#include <vector>\n', None),
    "tests/b.hpp": ("", None),
    "launcher/x.hpp": ("", None),
    ".hidden": ("", None),
    "README.md": ("", None),
    "tools/x": ("", "top level"),
    "notes.txt": ("", "top level"),
    "comm/up.cpp": ('#include "kernels/good.hpp"\n', "comm/ may not include kernels/"),
    "kernels/up.cpp": ('#include "parallel/plan.hpp"\n', "kernels/ may not include parallel/"),
    "kernels/side.cpp": ('#include "comm/good.hpp"\n', "kernels/ may not include comm/"),
    "parallel/engine_up.cpp": ('#include "launcher/x.hpp"\n', "parallel/ may not include launcher/"),
    "launcher/up.cpp": ('#include "tests/b.hpp"\n', "launcher/ may not include tests/"),
    "kernels/relative.cpp": ('#include "good.hpp"\n', "from the repository root"),
    "kernels/dots.cpp": ('#include "kernels/../kernels/good.hpp"\n', "without '..'"),
    "kernels/lost.cpp": ('#  include "kernels/lost.hpp"\n', "files of this tree"),
    "kernels/angle.cpp": ("#include <kernels/good.hpp>\n", "in quotes"),
    "kernels/mpi.cpp": ("#include <mpi.h>\n", "mpi.h belongs"),
    "launcher/mpi.cpp": ('#include "mpi.h"\n', "mpi.h belongs"),
    "parallel/strategies/bytes.cpp": ('#include "comm/good.hpp"\n', "may not include comm/"),
    "parallel/run.cpp": ('#include "parallel/engine.hpp"\n', "the run half"),
    "parallel/threads.cpp": ("#include <omp.h>\n", "pure integers"),
    "parallel/blas.cpp": ("#include <cblas.h>\n", "pure integers"),
}


def selftest():
    """What is wrong with the checker, shown on a small tree."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, (text, _) in SELFTEST.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        complaints = check(root, sorted(SELFTEST))
    wrong = []
    for name, (_, reason) in SELFTEST.items():
        subject = name.split("/")[0] if reason == "top level" else name
        about = [text for text in complaints if text.startswith(subject + ":")]
        if reason is None and about:
            wrong.append(f"complained about {name}: {about}")
        if reason is not None and [reason in text for text in about] != [True]:
            wrong.append(f"wanted one '{reason}' about {name}, got {about}")
    return wrong


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--selftest":
        complaints = selftest()
    else:
        root = pathlib.Path(sys.argv[1]).resolve()
        names = listed_by_git(root)
        if names is None:
            print("no git checkout here: the top level is not checked, the six folders are")
            names = found_on_disk(root)
        complaints = check(root, names)
        print(f"{len(names)} files")
    print("\n".join(complaints))
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()
