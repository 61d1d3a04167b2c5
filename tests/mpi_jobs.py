"""Jobs of several processes: communicators of threads, and real ones under mpiexec with a time limit."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest


class ThreadComm:
    """A communicator of mpi4py's interface, whose processes are threads."""

    class Job:
        def __init__(self, size):
            self.size, self.slots = size, [None] * size
            self.barrier = threading.Barrier(size, timeout=60)
            self.messages = 0

    def __init__(self, job, rank):
        self.job, self.rank = job, rank

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.job.size

    def allgather(self, value):
        self.job.slots[self.rank] = value
        self.job.barrier.wait()
        found = copy.deepcopy(self.job.slots)  # as a message: nothing is shared
        self.job.barrier.wait()
        return found

    def bcast(self, value, root=0):
        return self.allgather(value)[root]

    def Bcast(self, buffer, root=0):
        buffer[:] = self.allgather(buffer.copy())[root]

    def Allreduce(self, send, receive):
        self.job.messages += self.rank == 0
        receive[:] = sum(self.allgather(send.copy()))

    def Abort(self, code):
        self.job.barrier.abort()


def in_threads(size, work):
    """Call ``work(comm)`` in each of some threads; return what each returned or raised."""
    job, found = ThreadComm.Job(size), [None] * size

    def run(rank):
        try:
            found[rank] = work(ThreadComm(job, rank))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def mpiexec(program, size, *arguments, seconds=120):
    """Run a program in some processes; return its exit status, output and errors, and how long it took."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    beside = Path(sys.executable).parent / "mpiexec"
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        pytest.skip("there is no mpiexec: pip install mpich")
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                                "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # fmt: skip
    command = [launcher, "-n", str(size), sys.executable, "-P", program, *arguments]
    begin = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, errors = process.communicate()
            pytest.fail(f"hangs: no end within {seconds} s\n{output}\n{errors}")
    return process.returncode, output, errors, time.monotonic() - begin
