"""A command that nobody started as one of a job looks for no network but Open MPI's own, unless told to.

    alone.py DATTN MPIRUN...
"""

import re
import sys

import jobs
from jobs import Failed, want

RUN = "run --tokens 16 --heads 1 --head-dim 8 --threads 1 --machine latency=1e-6,bandwidth=1e9,rate=1e9".split()
TALKATIVE = {"OMPI_MCA_pml_base_verbose": "20"}


def looked_at(done):
    return re.findall(r"components_open: found loaded component (\S+)", done.stdout + done.stderr)


def main():
    _, starter = jobs.asked(sys.argv[1:], __doc__)
    try:
        for _ in range(3):  # and leaves nothing behind that the next one minds
            done = starter.run(RUN, environment=TALKATIVE)
            want(done.returncode == 0 and looked_at(done) == ["ob1"], f"{done.returncode}: {done.stdout}{done.stderr}")
        done = starter.run(RUN, environment={**TALKATIVE, "OMPI_MCA_pml": "nothing"})
        want(done.returncode != 0 and looked_at(done) == [], f"the user's word did not stand: {done.stdout}{done.stderr}")
    except Failed as failed:
        sys.exit(f"FAILED: {failed}")


main()
