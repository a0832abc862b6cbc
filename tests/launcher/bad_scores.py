"""Rows of bad_input.py: what scores cannot be made of. add(name, words, code, says) takes one."""

USAGE, INPUT = 2, 3


# fmt: off
def score_cases(add):
    run = "run --tokens 31 --threads 1 "
    plan = "plan --ranks 4 --tokens 31 "
    for word in ("0", "-3", "1e-40", "1e60"):
        add(f"soft cap {word}", f"{run}--soft-cap={word}", USAGE, "--soft-cap: .* is not between 1e-30 and 1e\\+30")
    for option in ("alibi", "sinks"):
        add(f"{option} of other heads", f"{run}--heads 4 --{option} 1,2,3", USAGE, f"--{option}: 3 numbers for 4 query heads; give one for each, or one for all")
        add(f"{option} without a number", f"{run}--heads 2 --{option} 1,", USAGE, f"--{option}: '' is not a finite number")
    for option in ("alibi", "sinks", "sigmoid"):
        add(f"{option} nan", f"{run}--{option} nan", USAGE, f"--{option}: 'nan' is not a finite number")
        add(f"{option} beyond float32", f"{run}--{option} 1e60", USAGE, f"--{option}: '1e60' is beyond float32")
    add("sinks of a sigmoid", run + "--sigmoid auto --sinks 1", USAGE, "--sinks with --sigmoid: a sink is part of what softmax divides by")
    add("relative bias", run + "--relative-bias bias.npy --check", 0, "relative bias up to 2.*PASSED")
    add("relative bias that leaves one key or none", run + "--relative-bias bias_one.npy --check --grad random", 0, "PASSED.*PASSED")
    add("relative bias of other heads", run + "--heads 4 --relative-bias bias.npy", INPUT, r"--relative-bias 'bias.npy': has shape \[8, 5\]; give \[4, 2 \* reach \+ 1\]")
    add("relative bias of even length", plan + "--relative-bias bias_even.npy", INPUT, r"bias_even.npy': has shape \[8, 4\]")
    add("relative bias of three dimensions", run + "--relative-bias q.npy", INPUT, r"q.npy': has shape \[7, 2, 4\]")
    add("relative bias too long", run + "--relative-bias bias_long.npy", INPUT, "bias_long.npy': has 262147 distances for 8 heads; at most 1048576")
    add("relative bias missing", plan + "--relative-bias none.npy", INPUT, "none.npy.*No such file")
    add("relative bias without a name", run + "--relative-bias ''", USAGE, "--relative-bias: the name is empty")
    add("relative bias replaced", run + "--relative-bias bias.npy --out bias.npy", USAGE, "bias.npy")
    add("key weights of other length", run + "--key-weights bias.npy", INPUT, r"--key-weights 'bias.npy': has shape \[8, 5\]; give \[31\] or \[31, 8\]")
    add("key weights infinite", run + "--key-weights weights_inf.npy", INPUT, "--key-weights 'weights_inf.npy': number 0 is inf; give finite ones, or -inf")
    add("key weights of ints", plan + "--key-weights weights_ints.npy", INPUT, "weights_ints.npy.*signed integers")
    add("no key counts", run + "--key-weights weights.npy --check --grad random", 0, "PASSED.*PASSED")
    for words, why in (
        ("--alibi auto", "a pseudo-key has no position"),
        ("--relative-bias bias.npy", "a pseudo-key has no position"),
        ("--sigmoid auto", "a pseudo-key weighs as a softmax has it"),
        ("--key-weights weights.npy", "a pseudo-key is a mean of keys that weigh the same"),
    ):
        add(f"{words} of pseudo-keys", f"{run}--queries 2 {words} --compensate head", USAGE, f"--compensate with {words.split()[0]}: {why}")
