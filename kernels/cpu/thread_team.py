"""The threads that run one kernel together: how a call gets workers, and the barrier at which they meet.

The caller's thread enters a kernel, claims workers there (:func:`summon`), and these call the same kernel with the same
arguments, except for the number of the thread. They have finished before the kernel returns (:func:`dismiss`). Workers
and their mailboxes are described in ``worker.py``.

The threads of a call share the `team`, a (1 + rows, 8) int64 array with a cache line for each row, so that waiting on
one does not disturb the others. Only one call at a time uses it.

=======================  ========================================================================================
``team[0, ARRIVALS]``    how often threads have arrived at barriers
``team[0, FINISHED]``    how many workers have finished the call
``team[0, WANTED]``      how many workers the call may have at most
``team[1 + t, PASSED]``  how many barriers thread t has passed
``team[1 + t, MAILBOX]`` address of the mailbox of a worker that may be claimed; t from 1 on
``team[1 + t, TAKEN]``   how many of thread t's items were taken, in even rounds; in odd ones in the word after it
``team[1 + t, THREADS]`` how many threads the call has
``team[1 + t, MEMBER]``  address of the mailbox of thread t's worker, which this call has claimed
=======================  ========================================================================================

Waits, and why each ends
------------------------
- For a worker to wake: after 0.1 s the caller takes its call back and continues without the worker.
- At a barrier, and in :func:`dismiss`: only for threads that have answered, so they are awake and in compiled code.
That
  code takes no locks, allocates nothing and calls nothing that blocks, so only the system's scheduler can delay it. A
  thread that waits for long sleeps between polls, so that the other proceeds even if it needs the same core and has a
  lower priority. In a forked child, which has no other threads, all mailboxes are ``ABSENT``.
- Of a worker at its lock: may last forever; no thread waits for it then.
"""

from __future__ import annotations

from fastlstm.kernels.cpu.atomics import (
    address_as_number,
    compare_and_swap,
    fetch_add,
    load_atomic,
    pointer_at,
    release_lock,
    wait_a_little,
)
from fastlstm.kernels.cpu.jit import kernel, routine
from fastlstm.kernels.cpu.vector import CACHE_LINE, VECTOR_BYTES, address, lanes_of, minimum, offset, prefetch
from fastlstm.kernels.cpu.worker import (
    ABSENT,
    ASLEEP,
    CALLED,
    CLAIMED,
    IDLE,
    LOCK,
    MOST_ARGUMENTS,
    STATE,
    hand_over,
    look_while,
    run,
)

__all__ = [
    "RECORD_ROWS", "barrier", "dismiss", "fetch", "record", "run_records", "share", "summon", "take",
    "threads_of",
]  # fmt: skip

ARRIVALS, FINISHED, WANTED = range(3)  # of a team's first row
PASSED, MAILBOX, TAKEN, _, THREADS, MEMBER = range(6)  # of a thread's row
_CALL, _ARGUMENTS = 16, 17  # of a record: after the two rows of a team of one thread
RECORD_ROWS = 2 + -(-(8 + MOST_ARGUMENTS) // 64)

_LOOKS = 11_000  # at workers that are to wake: a tenth of a second
_HELPED = 2  # how many other threads one looks to for work: each look costs as much as waiting for another core

# --- calling a kernel together ------------------------------------------------------------------------------


@routine
def threads_of(team, thread):
    """Return the number of threads that this call has."""
    return team[1 + thread, THREADS]


@routine
def summon(team, call, arguments):
    """Claim workers for the team, and have them make a call, too."""
    if team[0, WANTED] == 0:
        return
    members = _claim(team)
    for thread in range(1 + members):
        team[1 + thread, THREADS] = 1 + members
    for thread in range(1, 1 + members):
        _hand_over(team, thread, call, arguments, thread)


@routine
def dismiss(team):
    """Wait until the workers of the team have finished the call; then the team is as it was before."""
    if team[0, WANTED] == 0:
        return
    others = team[1, THREADS] - 1
    _wait_for(team, others)
    team[0, ARRIVALS] = 0
    for row in range(1, 2 + others):
        team[row, PASSED] = team[row, TAKEN] = team[row, TAKEN + 1] = 0


@routine
def _wait_for(team, members):
    spins = 0
    while load_atomic(offset(address(team), FINISHED)) < members:
        wait_a_little(spins)
        spins += 1
    team[0, FINISHED] = 0


@routine
def _claim(team):
    """Claim as many workers as the team wants, if there are so many; return their number.

    Workers that are awake come first; then others are woken.
    """
    members = 0
    for row in range(2, team.shape[0]):
        if members < team[0, WANTED]:
            state = offset(pointer_at(team[row, MAILBOX]), STATE)
            if load_atomic(state) == IDLE and compare_and_swap(state, IDLE, CLAIMED):
                members += 1
                team[1 + members, MEMBER] = team[row, MAILBOX]
    return members if members == team[0, WANTED] else _wake(team, members)


@routine
def _wake(team, members):
    """Claim workers that are asleep, too; return how many there are in all, without those that did not answer."""
    called = members
    for row in range(2, team.shape[0]):
        if called < team[0, WANTED]:
            mailbox = pointer_at(team[row, MAILBOX])
            state = offset(mailbox, STATE)
            if load_atomic(state) == ASLEEP and compare_and_swap(state, ASLEEP, CALLED):
                release_lock(mailbox[LOCK])
                called += 1
                team[1 + called, MEMBER] = team[row, MAILBOX]
    looks = 0
    for member in range(1 + members, 1 + called):
        state = offset(pointer_at(team[1 + member, MEMBER]), STATE)
        looks += look_while(state, CALLED, _LOOKS - looks)
        if not compare_and_swap(state, CALLED, ABSENT):  # it has answered
            members += 1
            team[1 + members, MEMBER] = team[1 + member, MEMBER]
    return members


@routine
def _hand_over(team, member, call, arguments, thread):
    done = address_as_number(offset(address(team), FINISHED))
    hand_over(pointer_at(team[1 + member, MEMBER]), call, arguments, thread, done)


# --- calls that are recorded, and run at once ---------------------------------------------------------------


@routine
def record(team, call, arguments, size):
    """Note the call of the kernel in which this stands, to be made later; `team` is a record."""
    here, source = address(team), pointer_at(arguments)
    here[_CALL], target = call, offset(here, _ARGUMENTS)
    for n in range(size // 8):
        target[n] = source[n]


@kernel
def run_records(records, team, thread):
    """Make recorded calls, each on one thread: as many at once as there are threads, the others afterwards.

    Parameters
    ----------
    records : (n, RECORD_ROWS, 8) int64 array
        Zeros, but for ``records[:, 1, THREADS]``, which is 1; then each was the team of a kernel called with thread -1,
        whose arguments are still there.
    team : (1 + rows, 8) int64 array
    thread : int
        0.
    """
    members = _claim(team) if team[0, WANTED] else 0
    for member in range(1, 1 + members):
        first = offset(address(records), member * RECORD_ROWS * 8)
        _hand_over(team, member, first[_CALL], address_as_number(offset(first, _ARGUMENTS)), thread)
    for number in range(records.shape[0]):
        if number == 0 or number > members:
            first = offset(address(records), number * RECORD_ROWS * 8)
            run(first[_CALL], address_as_number(offset(first, _ARGUMENTS)), thread)
    if team[0, WANTED]:
        team[1, THREADS] = 1 + members
        _wait_for(team, members)


# --- within a call ------------------------------------------------------------------------------------------


@routine
def barrier(team, thread):
    """Wait until every thread of the team arrives; what they wrote before is visible afterwards."""
    threads = team[1 + thread, THREADS]
    if threads == 1:
        return
    passed = team[1 + thread, PASSED] + 1
    team[1 + thread, PASSED] = passed
    arrivals = address(team)
    fetch_add(arrivals, 1)
    spins = 0
    while load_atomic(arrivals) < passed * threads:
        wait_a_little(spins)
        spins += 1


@routine
def fetch(pointer, count):
    """Prefetch elements that other threads wrote: loads in turn would each wait for another core's cache."""
    for n in range(0, count, CACHE_LINE * lanes_of(pointer) // VECTOR_BYTES):
        prefetch(offset(pointer, n))


@routine
def share(count, team, thread):
    """Divide `count` items evenly; return the first item of this thread and the first of the next."""
    return _share_of(count, team[1 + thread, THREADS], thread)


@routine
def _share_of(count, threads, thread):
    return count * thread // threads, count * (thread + 1) // threads


@routine
def take(count, team, thread, turn):
    """Take an item of this round's: of this thread's own, or when none is left, of a thread that is behind.

    A core may be slower for a while, because another process uses it or its sibling; at the barrier all threads would
    wait for it. Only items that the other thread has not begun are taken.

    Parameters
    ----------
    count : int
        All threads' items, each thread's own being its :func:`share`.
    team : array, IN and OUT
    thread : int
    turn : int
        Number of the round. Between two rounds there is a barrier; odd rounds take the items backwards.

    Returns
    -------
    int
        The item; -1 if none is left.
    """
    threads = team[1 + thread, THREADS]
    for n in range(minimum(threads, 1 + _HELPED)):
        other = (thread + n) % threads
        first, last = _share_of(count, threads, other)
        taken = offset(address(team), (1 + other) * team.shape[1] + TAKEN + (turn & 1))
        if load_atomic(taken) < last - first:
            item = fetch_add(taken, 1)
            if item < last - first:
                return last - 1 - item if turn & 1 else first + item
    # No thread reads the next round's count before the barrier, or the last round's after it.
    team[1 + thread, TAKEN + 1 - (turn & 1)] = 0
    return -1
