"""The engine room: bounds, order, deadlines, what is dropped, and what one lane's failure leaves alone."""

import threading
import time

import numpy as np
import pytest
from fcn_deploy.runtime.serve.room import Held, Job, RefusedError, Room
from fcn_deploy.runtime.stream import CALLERS, TOGETHER, Labelled
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_deploy import DeployError


class Network:
    """A stream whose runs wait until they are let go."""

    def __init__(self, alike=None, open=False):
        self.groups, self._alike, self.let_go = [], alike, threading.Event()
        self.inside = threading.Semaphore(0)
        if open:
            self.let_go.set()

    def alike(self, size):
        return self._alike

    def label(self, images, kinds, begins):
        self.inside.release()
        assert self.let_go.wait(60)
        try:
            begins()
        except Exception as error:
            return [Labelled(error, None, 0.0)]
        self.groups.append([image[0, 0, 0] for image in images])
        return [Labelled((image * 2,), None, 0.5) for image in images]


def job(network, value=0, deadline=None, read=None, write=lambda results: int(results[0][0, 0, 0])):
    image = np.full((2, 3, 1), value)
    return Job(network, (2, 3), read or (lambda: image), ("labels",), write, deadline)


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def room():
    room = Room(4, 1000)
    yield room
    room.close()


def filled(room, network):
    """Both lanes in the network, and nothing waiting."""
    jobs = [job(network, value) for value in range(CALLERS)]
    for each in jobs:
        room.submit(each)
        assert network.inside.acquire(timeout=60)
    return jobs


def test_a_job_comes_back_with_its_answer_and_its_times(room):
    one = job(Network(open=True), 21)
    room.submit(one)
    done = one.future.result(60)
    assert done.answer == 42 and done.seconds["infer"] == 0.5
    assert set(done.seconds) == {"queue", "read", "infer", "write"} and min(done.seconds.values()) >= 0


def test_more_than_the_queue_holds_are_refused_at_once_and_the_rest_is_run_in_order(room, network):
    taken = filled(room, network)
    for value in range(10, 14):
        taken.append(job(network, value))
        room.submit(taken[-1])
    for _ in range(3):
        with pytest.raises(RefusedError, match="4 requests wait already") as refused:
            room.submit(job(network))
        assert refused.value.reason == "queue"
    assert (room.waiting, room.pending) == (4, 6)
    network.let_go.set()
    assert [each.future.result(60).answer for each in taken] == [0, 2, 20, 22, 24, 26]
    order = [value for group in network.groups for value in group if value >= 10]
    assert sorted(order) == order or len(order) == 4  # two lanes may pass each other at the end alone
    assert set(order) == {10, 11, 12, 13}


def test_jobs_that_are_dropped_never_run_and_leave_their_places(room, network):
    running = filled(room, network)
    dropped = [job(network, 100 + index) for index in range(4)]
    for each in dropped:
        room.submit(each)
    for each in dropped:
        assert each.future.cancel()
    assert room.waiting == 0
    after = job(network, 7)
    room.submit(after)
    network.let_go.set()
    assert after.future.result(60).answer == 14 and [each.future.result(60).answer for each in running] == [0, 2]
    assert max(value for group in network.groups for value in group) == 7


def test_a_job_that_is_dropped_while_its_image_is_read_does_not_reach_the_network(room):
    network, reading, go_on = Network(open=True), threading.Event(), threading.Event()

    def read():
        reading.set()
        assert go_on.wait(60)
        return np.zeros((2, 3, 1))

    one = job(network, read=read)
    room.submit(one)
    assert reading.wait(60) and one.future.cancel()
    go_on.set()
    two = job(network, 3)
    room.submit(two)
    assert two.future.result(60).answer == 6 and network.groups == [[3]]


def test_what_is_late_is_not_run(room, network):
    filled(room, network)
    late = job(network, 9, deadline=time.monotonic() - 1)
    soon = job(network, 8, deadline=time.monotonic() + 600)
    room.submit(late), room.submit(soon)
    network.let_go.set()
    with pytest.raises(RefusedError, match="time was over") as refused:
        late.future.result(60)
    assert refused.value.reason == "late" and soon.future.result(60).answer == 16
    assert [9] not in network.groups


def test_an_image_that_cannot_be_read_and_an_answer_that_cannot_be_written_end_their_own_job_alone(room):
    def broken(*_):
        raise DeployError("broken")

    network = Network(open=True)
    jobs = [job(network, read=broken), job(network, write=broken), job(network, 4)]
    for each in jobs:
        room.submit(each)
    for each in jobs[:2]:
        with pytest.raises(DeployError, match="broken"):
            each.future.result(60)
    assert jobs[2].future.result(60).answer == 8


def test_eight_of_one_padded_size_are_given_to_the_network_together_and_fewer_alone():
    network = Network(alike=(32, 32))
    room = Room(64, 1000)
    filled(room, network)
    jobs = [job(network, value) for value in range(10, 10 + TOGETHER + 3)]
    for each in jobs:
        room.submit(each)
    network.let_go.set()
    assert [each.future.result(60).answer for each in jobs] == [2 * value for value in range(10, 10 + len(jobs))]
    room.close()
    together = [group for group in network.groups if len(group) > 1]
    assert together == [list(range(10, 10 + TOGETHER))]


def test_jobs_of_other_results_are_not_run_together():
    network = Network(alike=(32, 32))
    room = Room(64, 1000)
    filled(room, network)
    jobs = [job(network, value) for value in range(10, 10 + TOGETHER)]
    jobs[3].kinds = ("probabilities",)
    for each in jobs:
        room.submit(each)
    network.let_go.set()
    for each in jobs:
        each.future.result(60)
    room.close()
    assert all(len(group) == 1 for group in network.groups)


def test_bytes_are_held_within_the_bound_and_given_back(room):
    with room.hold(600) as one:
        one.more(200)
        with pytest.raises(RefusedError, match="again") as refused:
            room.hold(300)
        assert refused.value.reason == "memory" and room.held == 800
        with pytest.raises(RefusedError, match="--queue-memory") as refused:
            one.more(300)  # alone it is too much already
        assert refused.value.reason == "too_large" and room.held == 800
    assert room.held == 0
    with room.hold(1000):
        pass
    assert room.held == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 700), max_size=40))
def test_whatever_is_held_and_given_back_adds_up(steps):
    room, open = Room(1, 1000), []
    for step in steps:
        if step < 0 and open:
            open.pop(0).close()
            continue
        try:
            open.append(room.hold(max(step, 0)))
        except RefusedError:
            assert room.held + step > 1000
        assert room.held == sum(each.bytes for each in open) <= 1000
    for each in open:
        each.close()
    assert room.held == 0
    room.close()


def test_requests_take_their_places_before_they_are_read(room, network):
    """Those of the free lanes too; who leaves makes room, also without a job."""
    places = [Held(room) for _ in range(4 + CALLERS)]
    for place in places:
        place.enter()
    with pytest.raises(RefusedError, match="4 requests wait"), Held(room) as one:
        one.enter()
    jobs = filled(room, network)
    with pytest.raises(RefusedError, match="4 requests wait"), Held(room) as one:
        one.enter()
    places.pop().close()
    with Held(room) as one:
        one.enter()
        with pytest.raises(RefusedError, match="4 requests wait"):
            Held(room).enter()
    for place in places:
        place.leave()
        place.close()
    network.let_go.set()
    assert [each.future.result(60).answer for each in jobs] == [0, 2]


def test_a_room_that_closes_ends_what_was_taken_and_takes_no_more(network):
    room = Room(4, 1000)
    jobs = filled(room, network)
    jobs.append(job(network, 5))
    room.submit(jobs[-1])
    closing = threading.Thread(target=room.close)
    closing.start()
    while not room._closed:
        time.sleep(0.001)
    with pytest.raises(RefusedError, match="stopping"):
        room.submit(job(network))
    network.let_go.set()
    closing.join(60)
    assert not closing.is_alive() and [each.future.result(0).answer for each in jobs] == [0, 2, 10]


def test_memory_that_was_kept_is_given_back_once_after_a_rest(monkeypatch):
    monkeypatch.setattr("fcn_deploy.runtime.serve.room.REST_SECONDS", 0.1)
    given_back = threading.Semaphore(0)
    room, network = Room(4, 1000, given_back.release), Network()
    assert given_back.acquire(timeout=10)  # what opening and warming up has left
    work = job(network)
    room.submit(work)
    assert not given_back.acquire(timeout=0.5)  # a lane is at work
    network.let_go.set()
    work.future.result(10)
    assert given_back.acquire(timeout=10)
    assert not given_back.acquire(timeout=0.5)
    room.close()
