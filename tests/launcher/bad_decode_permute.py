"""Rows of bad_input.py: what dattn decode and dattn permute must refuse. add(name, words, code, says) takes one."""

USAGE, INPUT, MEMORY, OUTPUT = 2, 3, 4, 5
FILES = "--q q.npy --k k.npy --v v.npy"


# fmt: off
def decode_cases(add):
    small = "decode --context 5 --steps 1 --heads 4 --kv-heads 2 --head-dim 8 --threads 1 "
    latent = "decode --context 5 --steps 1 --heads 4 --hidden 24 --q-rank 0 --kv-rank 16 --nope-dim 8 --rope-dim 4 --v-dim 8 --threads 1 "
    files = f"decode {FILES} --threads 1 "

    # Scores.
    for option, value in (("scale", "1"), ("soft-cap", "2"), ("alibi", "auto"), ("relative-bias", "bias.npy"), ("sinks", "1")):
        add(f"decode {option} of latents", f"{latent}--{option} {value}", USAGE, f"--{option}: latent attention has none")
        add(f"decode {option} of weights", f"decode --weights mla --{option} {value}", USAGE, f"--{option}: the files of --weights say it")
    add("decode relative bias of other heads", small + "--relative-bias bias.npy", INPUT, r"--relative-bias 'bias.npy': has shape \[8, 5\]; give \[4, ")
    add("decode relative bias missing", small + "--relative-bias none.npy", INPUT, "none.npy.*No such file")
    add("decode with a sigmoid", small + "--sigmoid auto", USAGE, "--sigmoid")

    # Options.
    add("decode unknown option", small + "--tokens 8", USAGE, "--tokens.*--help")
    add("decode near option", small + "--contxt 8", USAGE, "--contxt.*--context")
    add("decode positional", small + "extra", USAGE, "extra")
    add("decode form unknown", small + "--form ring", USAGE, "--form.*sequence, helix")
    add("decode model unknown", "decode --model gpt", USAGE, "--model")
    add("decode dtype f8", small + "--dtype f8", USAGE, "--dtype.*bf16")
    for word in ("''", "-1", "5,", ",5", "5,,6", "x", "1.5", "5x6", "9999999999G"):
        add(f"decode context {word}", f"decode --context {word}", USAGE, "--context")
    add("decode contexts for another batch", "decode --context 5,6 --batch 3", USAGE, "--context: 2 lengths for a batch of 3")
    add("decode batch too large", "decode --context 5 --batch 2M", USAGE, "--batch: at most 1048576")
    add("decode contexts too large", "decode --context 9000000000000000000,9000000000000000000", USAGE, "--context: at most 1099511627776")
    add("decode new too large", "decode --new 9000000000000000000", USAGE, "--new: at most 1048576")
    for option in ("batch", "new", "steps", "threads", "memory", "heads", "kv-heads", "head-dim", "value-dim"):
        add(f"decode {option} 0", f"decode --{option} 0", USAGE, f"--{option}")
    for option in ("hidden", "kv-rank", "nope-dim", "rope-dim", "v-dim", "slices", "calibration"):
        add(f"decode {option} 0", f"decode --{option} 0", USAGE, f"--{option}")
    for option in ("steps 2M", "warmup 2M", "watchdog 2M", "threads 1025"):
        add(f"decode {option}", f"decode --{option}", USAGE, f"--{option.split()[0]}: at most")
    add("decode warmup -1", small + "--warmup -1", USAGE, "--warmup")
    add("decode seed -1", small + "--seed -1", USAGE, "--seed")
    add("decode heads over kv heads", "decode --heads 6 --kv-heads 4", USAGE, "--heads.*6 query heads.*4 key heads")
    add("decode product beyond 2^60", "decode --context 512G --heads 64K --kv-heads 64K", USAGE, "--context.*2.60")
    add("decode mask unknown", small + "--mask sparse", USAGE, "--mask 'sparse'.*causal")
    add("decode mask of a batch", small + "--mask batch:sequences=1", USAGE, "--mask.*each sequence; --context and --batch")
    add("decode mask and head masks", small + "--mask full --head-masks masks.json", USAGE, "--mask and --head-masks: give one")
    add("decode json over head masks", "decode --context 5 --steps 1 --head-masks good.json --json good.json", USAGE, "good.json.*input")
    add("decode mask of latents", latent + "--mask window:3,0", USAGE, "--mask: latent attention is causal")
    for option in ("hidden", "q-rank", "nope-dim", "rope-dim", "v-dim"):
        add(f"decode {option} alone", f"decode --{option} 4", USAGE, f"--{option}: .*--model, --kv-rank or --weights")
    for option in ("kv-heads", "head-dim", "value-dim"):
        add(f"decode {option} of latents", f"{latent}--{option} 4", USAGE, f"--{option}: latent attention has none")
    add("decode latents without hidden", "decode --kv-rank 16", USAGE, "--kv-rank.*--hidden")
    add("decode latents of an odd rope", latent.replace("rope-dim 4", "rope-dim 3"), USAGE, "latent sizes: ")
    add("decode latent form alone", small + "--form latent-helix", USAGE, "--form latent-helix.*--model")
    add("decode tpla alone", small + "--form latent-tpla", USAGE, "--form latent-tpla.*--model")
    add("decode spectrum alone", small + "--spectrum 1", USAGE, "--spectrum.*--model")
    for word in ("nan", "inf", "x"):
        add(f"decode spectrum {word}", f"{latent}--spectrum {word}", USAGE, "--spectrum")
    for option in ("slices 2", "basis pca", "norm slice", "factor one", "calibration 9"):
        for start in (small, latent + "--form helix "):
            add(f"decode {option} {start}", f"{start}--{option}", USAGE, f"--{option.split()[0]}: is of --form latent-tpla or latent-exact")
    add("decode basis unknown", latent + "--form latent-tpla --basis dct", USAGE, "--basis.*none, hadamard, pca")
    add("decode slices too many", latent + "--form latent-tpla --slices 65537", USAGE, "--slices: at most 65536")
    add("decode mesh and slices", latent + "--form latent-exact --mesh 1x1", USAGE, "--mesh.*--slices")
    add("decode mesh of one axis", small + "--mesh 1", USAGE, "--mesh: two extents")
    add("decode mesh of three axes", small + "--mesh 1x1x1", USAGE, "--mesh: two extents")
    for start in (small, latent + "--form latent-helix "):
        add(f"decode values {start}", f"{start}--values before", USAGE, "--values: is of --form latent-sequence")

    # Prefixes.
    for words, why in (("''", "levels is not set"), ("levels=2x3", "level 2x3 has more groups than the 1 seq"),
                       ("levels=1x3,size=2", "nothing is called 'size'; the tree is written levels=GxL"), ("levels=1x0", "levels has '0'"),
                       ("levels=1x3,suffix=3", "suffix and --context say the same"), ("levels=1x512T", "levels has '512T'")):
        add(f"decode tree {words}", f"{small}--prefix-tree {words}", USAGE, f"--prefix-tree: .*{why}")
    add("decode tree beyond memory", "decode --prefix-tree levels=1x1099511627776", MEMORY, "sequence needs .*iB.*has .*iB.*--prefix-tree")
    add("decode tree of slices beyond memory", f"{latent}--form latent-exact --prefix-tree levels=1x1099511627776", MEMORY, "latent-exact needs .*iB.*has .*iB.*--prefix-tree")
    add("decode tree of files too short", files + "--prefix-tree levels=1x5 --steps 2 --warmup 1", INPUT, "7 tokens of Q.*where those of --prefix-tree.*are 8")
    add("decode DATTN_ISA", small, USAGE, "DATTN_ISA.*nonsense", environment={"DATTN_ISA": "nonsense"})
    add("decode Slurm tasks", small, USAGE, "srun.*--mpi=pmix", environment={"SLURM_NTASKS": "4"})

    # What does not fit the ranks.
    add("decode mesh for other ranks", small + "--mesh 2x2", USAGE, "--mesh: .*4 ranks.*1", ranks=1)
    add("decode mesh 2x2 on 3 ranks", small + "--form helix --mesh 2x2", USAGE, "rank 0.*--mesh: .*4 ranks.*3", ranks=3)
    add("decode heads by tokens", small + "--form heads --mesh 2x1", USAGE, "--form: heads splits no tokens", ranks=2)
    add("decode sequence by heads", small + "--form sequence --mesh 1x2", USAGE, "--form: sequence splits no heads", ranks=2)
    add("decode latents by heads", latent + "--form latent-sequence --mesh 1x2", USAGE, "--form: sequence splits no heads", ranks=2)
    add("decode tpla of 2 slices on 1 rank", latent + "--form latent-tpla --slices 2", USAGE, "--slices.*2 slices do not divide 1 ranks")
    add("decode tpla of 2 slices on 3 ranks", latent + "--form latent-tpla --slices 2", USAGE, "--slices.*2 slices do not divide 3 ranks; take a divisor", ranks=3)
    add("decode slices beyond the latent", latent + "--form latent-exact --slices 17", USAGE, "--slices.*1 to kv_rank = 16")
    add("decode hadamard of 12", latent.replace("kv-rank 16", "kv-rank 12") + "--form latent-exact --basis hadamard", USAGE, "--basis.*power of two, not 12")
    add("decode exact on 3 ranks", latent + "--form latent-exact --check", 0, "PASSED", ranks=3)

    # Memory.
    add("decode too much memory", "decode --context 64M --batch 64", MEMORY, "sequence needs .*iB.*has .*iB.*--context")
    add("decode less memory than needed", small + "--memory 1", MEMORY, "sequence needs .* which has 1 B.*--memory")
    add("decode little memory on 2 ranks", small + "--memory 1K --form helix", MEMORY, "rank 0.*helix needs .*has 1.0 KiB", ranks=2)
    add("decode little memory for slices", latent + "--memory 1K --form latent-tpla", MEMORY, "rank 0.*latent-tpla needs", ranks=2)
    add("decode little memory for latents", latent + "--memory 1K", MEMORY, "latent-sequence needs .*has 1.0 KiB")

    # Files: 7 tokens.
    add("decode files", files + "--context 3 --steps 3 --check", 0, "PASSED")
    add("decode q alone", "decode --q q.npy", USAGE, "--q, --k and --v name three files")
    add("decode q empty", "decode --q '' --k k.npy --v v.npy", USAGE, "--q")
    add("decode k missing", "decode --q q.npy --k none.npy --v v.npy", INPUT, "none.npy")
    add("decode q flat", "decode --q flat.npy --k k.npy --v v.npy", INPUT, "flat.npy.*2 dimensions")
    add("decode q of ints", "decode --q ints.npy --k k.npy --v v.npy", INPUT, "ints.npy.*signed integers")
    add("decode k of 3 heads for 2", "decode --q q.npy --k three_heads.npy --v v.npy", INPUT, "three_heads.npy.*no multiple")
    add("decode v of other length", "decode --q q.npy --k k.npy --v longer_v.npy", INPUT, "longer_v.npy.*8 tokens.*7")
    add("decode q of other length", "decode --q longer_v.npy --k k.npy --v v.npy --context 3 --steps 3", INPUT, "8 tokens of Q and 7 of K and V.*are 7")
    add("decode files too short", files + "--context 4 --steps 3", INPUT, "7 tokens of Q.*sequence of --context.*are 8")
    add("decode files too long", files + "--context 1,1 --steps 1", INPUT, "7 tokens of Q.*2 sequences of --context.*are 6")
    for option in ("heads", "kv-heads", "head-dim", "value-dim"):
        add(f"decode files and {option}", f"{files}--{option} 2", USAGE, f"--{option} is for generated inputs")
    add("decode files of latents", f"{latent} {FILES}", USAGE, "--q, --k, --v: latent attention makes them")
    add("decode missing file on rank 1", files + "--context 3 --steps 3", INPUT, "rank 1.*missing.npy", ranks=2, other="decode --q missing.npy --k k.npy --v v.npy --threads 1 --context 3 --steps 3")

    # Outputs.
    for option in ("out", "lse", "json"):
        add(f"decode {option} into nowhere", f"{small}--{option} nowhere/x", OUTPUT, "nowhere/x.*mkdir")
        add(f"decode {option} empty", f"{small}--{option} ''", USAGE, f"--{option}")
    add("decode out into nowhere on 2 ranks", small + "--out nowhere/x", OUTPUT, "rank 0.*nowhere/x", ranks=2)
    add("decode out in /proc on 2 ranks", small + "--out /proc/x.npy", OUTPUT, "rank 0.*/proc/x.npy", ranks=2)
    add("decode out to stdout", small + "--out -", USAGE, "--out")
    add("decode lse over out", small + "--lse X --out ./X", USAGE, "X.*output")
    add("decode lse of tpla", latent + "--form latent-tpla --lse X", USAGE, "--lse: each slice of latent-tpla", ranks=2)
    add("decode out over v", files + "--context 3 --steps 3 --out ./v.npy", USAGE, "v.npy.*input")
    add("decode json over out", small + "--out X --json ./X", USAGE, "X.*output")
    add("decode json over k", files + "--context 3 --steps 3 --json k.npy", USAGE, "k.npy.*input")

    # Several ranks.
    add("decode help", "decode --help", 0, "--form.*--out")
    for field, first, second in (("--context", "5", "6"), ("--form", "helix", "tree"), ("--dtype", "f4", "bf16"), ("--seed", "1", "2"),
                                 ("--new", "1", "2"), ("--steps", "1", "2"), ("--heads", "8", "16"), ("--out", "O.npy", "P.npy")):
        add(f"decode ranks differ in {field}", f"decode --threads 1 {field} {first}", USAGE, f"rank 1.*{field}.*where rank 0.*same arguments", ranks=2, other=f"decode --threads 1 {field} {second}")
    add("decode one rank checks", small, USAGE, "rank 1.*--check", ranks=2, other=small + "--check")


def permute_cases(add):
    whole = "permute --dims 7 --tile 2 --in q.npy --out P.npy"
    for option in ("dims 7", "tile 2", "in q.npy", "out P.npy"):
        add(f"permute without {option}", whole.replace(f" --{option}", ""), USAGE, f"--{option.split()[0]}: ")
    for word in ("''", "0", "-1", "x7", "7x", "7xx1", "1.5", "abc", "1x7x1x1", "9999999999999999999"):
        add(f"permute dims {word}", whole.replace("dims 7", f"dims {word}"), USAGE, "--dims")
        add(f"permute tile {word}", whole.replace("tile 2", f"tile {word}"), USAGE, "--tile")
    add("permute tile of other dims", whole.replace("tile 2", "tile 2x2"), USAGE, "--tile: 2 lengths where --dims has 1")
    add("permute dims beyond 2^60", whole.replace("dims 7", "dims 2Gx2Gx2G"), USAGE, "--dims: more than 2.60")
    add("permute dims of other tokens", whole.replace("dims 7", "dims 2x4"), INPUT, "q.npy' has 7 tokens.*--dims 2x4 has 8")
    add("permute dims of far more tokens", whole.replace("dims 7", "dims 1Gx1G"), INPUT, "q.npy' has 7 tokens")
    for name, why in (("none", "No such file"), ("text", "wrong magic"), ("truncated", "cut short"), ("bools", "bool"), ("fortran", "Fortran"), ("pipe", "pipe")):
        add(f"permute {name}", whole.replace("q.npy", f"{name}.npy"), INPUT, f"{name}.npy.*{why}")
    add("permute unknown option", whole + " --reverse", USAGE, "--reverse")
    add("permute value of a flag", whole + " --inverse=1", USAGE, "--inverse")
    add("permute over its input", whole.replace("P.npy", "./q.npy"), USAGE, "q.npy.*input")
    add("permute to stdout", whole.replace("P.npy", "-"), USAGE, "--out")
    add("permute into nowhere", whole.replace("P.npy", "nowhere/x"), OUTPUT, "nowhere/x.*mkdir")
    add("permute into /proc", whole.replace("P.npy", "/proc/x.npy"), OUTPUT, "/proc/x.npy")
    add("permute help", "permute --help", 0, "--inverse")
# fmt: on
