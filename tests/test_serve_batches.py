"""Files of requests over HTTP: OpenAI's Files and Batch APIs to the unmodified ``openai`` package."""

from __future__ import annotations

import asyncio
import base64
import stat
import threading
import time

import openai
import pytest
import serve_stub
from batches import ENGINE, LONG, SAME, URL, apart, body, line, lines, results_of
from openai.types import Batch, FileDeleted, FileObject
from serving import serving

from intaglio.profiles.errors import UsageError

KEYS = {"first": "a-key-of-the-first-one", "second": "a-key-of-the-second-one"}
SOON = 2.0  # seconds for a picture of 2 steps beside a batch; measured 0.13 to 0.28, and 2.6 if it did not go first
ENDED = ("completed", "failed", "cancelled", "expired")


@pytest.fixture(scope="module")
def server(tiny_artifact, tmp_path_factory):
    keys, place = tmp_path_factory.mktemp("keys") / "keys", tmp_path_factory.mktemp("tmp")
    keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    flags = (*ENGINE, "--api-key-file", keys, "--limit", "batch_bytes=100000", "--limit", "batch_lines=60")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(place))
        with serving(f"tiny={tiny_artifact.folder}", flags=flags) as running:
            running.place = place
            yield running
    assert list(place.iterdir()) == [], "files of clients outlive the server"


@pytest.fixture(scope="module")
def clients(server):
    made = {n: openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for n, key in KEYS.items()}
    yield made
    for client in made.values():
        client.close()


@pytest.fixture
def client(clients):
    return clients["first"]


def sent(client, text, **fields):
    raw = client.files.with_raw_response.create(file=("requests.jsonl", text.encode()), purpose="batch", **fields)
    return FileObject.model_validate_json(raw.text)


def created(client, text, **fields):
    raw = client.batches.with_raw_response.create(
        input_file_id=sent(client, text).id, endpoint=URL, completion_window="24h", **fields
    )
    return Batch.model_validate_json(raw.text)


def ended(client, ident, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = Batch.model_validate_json(client.batches.with_raw_response.retrieve(ident).text)
        if found.status in ENDED:
            return found
        time.sleep(0.02)
    raise AssertionError(found)


def test_a_batch_from_its_file_to_its_results(client, server):
    text = lines(("good", body(seed=3, n=2)), ("bad", body(quality="hd")), ("drawn", body(response_format="url")))
    file = sent(client, text)
    assert (file.bytes, file.filename, file.purpose) == (len(text), "requests.jsonl", "batch")
    assert client.files.content(file.id).text == text
    assert client.files.retrieve(file.id).to_dict() == file.to_dict()
    metadata = {"for": "a test"}
    made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h", metadata=metadata)
    done = ended(client, made.id)
    assert done.status == "completed"
    assert done.metadata == metadata
    assert done.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at <= done.expires_at
    good = results_of(client.files.content(done.output_file_id).text)
    bad = results_of(client.files.content(done.error_file_id).text)
    assert (set(good), set(bad)) == ({"good", "drawn"}, {"bad"})
    assert bad["bad"]["response"]["body"]["error"]["param"] == "quality"
    plain = client.images.generate(n=2, prompt="a red cat", extra_body={"num_inference_steps": 2, "seed": 3})
    for picture, one in zip(good["good"]["response"]["body"]["data"], plain.data, strict=True):
        assert apart(base64.b64decode(picture["b64_json"]), base64.b64decode(one.b64_json)) <= SAME
    assert good["drawn"]["response"]["body"]["data"][0]["url"].startswith("data:image/png;base64,")

    (folder,) = server.place.glob("intaglio-batches-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for ident in (file.id, done.output_file_id, done.error_file_id):
        FileDeleted.model_validate(client.files.delete(ident).to_dict())
        with pytest.raises(openai.NotFoundError):
            client.files.content(ident)


def test_a_batch_that_is_made_again_has_other_pictures_where_no_seed_is_given(client):
    made = [ended(client, created(client, lines(("x", body()))).id) for _ in range(2)]
    first, second = (results_of(client.files.content(batch.output_file_id).text)["x"] for batch in made)
    assert first["response"]["body"]["data"][0] != second["response"]["body"]["data"][0]


def test_a_wrong_file_fails_its_batch_with_every_line_that_is_wrong(client):
    failed = ended(client, created(client, line() + "{oh\n" + line(url="/v1/embeddings") + line()).id)
    assert failed.status == "failed"
    assert [(error.line, error.param) for error in failed.errors.data] == [
        (2, None), (3, "url"), (4, "custom_id"),
    ]  # fmt: skip
    assert failed.failed_at
    assert failed.output_file_id is failed.error_file_id is None
    many = ended(client, created(client, "".join(line(custom_id=f"x{k}") for k in range(61))).id)
    assert "more than the 60 allowed" in many.errors.data[0].message


def test_cancelling_keeps_what_is_done_and_frees_the_rest(client):
    made = created(client, lines(("short", body()), *((f"long-{k}", body(**LONG, n=4)) for k in range(20))))
    while client.batches.retrieve(made.id).request_counts.completed == 0:
        time.sleep(0.02)
    begun = client.batches.cancel(made.id)
    assert begun.status in ("cancelling", "cancelled")
    done = ended(client, made.id, seconds=3)
    assert done.status == "cancelled"
    assert done.cancelling_at <= done.cancelled_at
    assert "short" in results_of(client.files.content(done.output_file_id).text)
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(made.id)


def test_a_request_that_somebody_waits_for_goes_first(clients):
    made = created(clients["second"], lines(*((f"x{k}", body(**LONG, n=2)) for k in range(40))))
    while clients["second"].batches.retrieve(made.id).status != "in_progress":
        time.sleep(0.02)
    time.sleep(0.2)
    for _ in range(3):
        begin = time.monotonic()
        clients["first"].images.generate(prompt="x", extra_body={"num_inference_steps": 2})
        assert time.monotonic() - begin < SOON
    now = clients["second"].batches.retrieve(made.id)
    assert now.status == "in_progress"
    assert now.request_counts.completed < 40
    with pytest.raises(openai.BadRequestError) as caught:
        clients["second"].files.delete(made.input_file_id)
    assert "cancel it first" in caught.value.message
    clients["second"].batches.cancel(made.id)
    ended(clients["second"], made.id)


def test_files_and_batches_are_their_senders(clients):
    own, other = clients["first"], clients["second"]
    made = ended(own, created(own, lines(("x", body()))).id)
    for call in (
        lambda c: c.files.retrieve(made.input_file_id),
        lambda c: c.files.content(made.output_file_id),
        lambda c: c.files.delete(made.output_file_id),
        lambda c: c.batches.retrieve(made.id),
        lambda c: c.batches.cancel(made.id),
        lambda c: c.batches.create(input_file_id=made.input_file_id, endpoint=URL, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            call(other)
    assert made.id in [batch.id for batch in own.batches.list()]
    assert made.id not in [batch.id for batch in other.batches.list()]
    assert made.output_file_id not in [file.id for file in other.files.list()]


def test_lists_go_in_pages(client):
    files = [sent(client, line()).id for _ in range(3)]
    assert [file.id for file in client.files.list(limit=1, purpose="batch")][:3] == files[::-1]  # the SDK asks on
    assert [file.id for file in client.files.list(order="asc", after=files[0])] == files[1:]
    assert {file.purpose for file in client.files.list(purpose="batch_output")} <= {"batch_output"}
    made = [created(client, line()).id for _ in range(2)]
    assert [batch.id for batch in client.batches.list(limit=1)][:2] == made[::-1]
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-0")
    for listed in (client.files.list, client.batches.list):
        with pytest.raises(openai.BadRequestError) as caught:
            listed(extra_query={"colour": "red"})
        assert caught.value.param == "colour"
    for ident in made:
        ended(client, ident)


UPLOADS = {
    "purpose": ({"purpose": "vision"}, "purpose"),
    "another field": ({"extra_body": {"color": "red"}}, "color"),
    "expiry": ({"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after.seconds"),
    "no name": ({"file": ("x" * 256, b"x")}, "file"),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_what_is_wrong_with_an_upload_is_named(client, case):
    fields, name = UPLOADS[case]
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(**{"file": ("x", b"x"), "purpose": "batch", **fields})
    assert caught.value.param == name


BATCHES = {
    "endpoint": "/v1/embeddings",
    "completion_window": "1h",
    "metadata": {"x": "y" * 513},
    "output_expires_after.seconds": {"anchor": "created_at", "seconds": 5},
}


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_wrong_with_a_batch_is_named(client, name):
    fields = {"input_file_id": "file-0", "endpoint": URL, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**{**fields, name.partition(".")[0]: BATCHES[name]})
    assert caught.value.param.startswith(name)


def test_a_file_that_is_too_long_is_refused(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("x", b"x" * 100_001), purpose="batch")
    assert caught.value.status_code == 413
    kept = sent(client, line(), expires_after={"anchor": "created_at", "seconds": 3600})
    assert kept.expires_at == kept.created_at + 3600


def test_there_is_room_for_so_many_files_and_bytes(tmp_path):
    from intaglio.runtimes.serve_errors import BadRequest, NotFound, TooLarge
    from intaglio.runtimes.serve_limits import Limits
    from intaglio.runtimes.serve_store import Store

    store = Store(Limits({"batch_files": 2, "batch_held_bytes": 10}))
    output = store.begin("me", "x", None)
    store.append(output, b"12345678")
    with pytest.raises(TooLarge):
        store.append(output, b"123")
    with pytest.raises(NotFound):
        store.of("me", output.id)  # it is not whole
    with store.arrival("me", 2), pytest.raises(BadRequest), store.arrival("me", 0):
        pass
    assert store.end(output) == output.id
    assert store.of("me", output.id).path.read_bytes() == b"12345678"
    assert store.end(store.begin("me", "y", None)) is None  # nothing was written to it
    output.expires_at = int(time.time())
    with pytest.raises(NotFound):
        store.of("me", output.id)
    assert not output.path.exists()


def test_a_batch_whose_window_is_over_says_which_lines_it_did_not_make(tiny_artifact, monkeypatch):
    import intaglio.runtimes.serve_batches as module
    from intaglio.runtimes.serve_hub import Hub
    from intaglio.runtimes.serve_limits import Limits
    from intaglio.runtimes.serve_model import ModelSettings
    from intaglio.runtimes.serve_room import Room
    from intaglio.runtimes.serve_store import Store

    monkeypatch.setattr(module, "WINDOW", 3)
    settings = ModelSettings(name="tiny", folder=tiny_artifact.folder, backend="openvino", threads=1)
    limits = Limits()
    store = Store(limits)

    async def run():
        hub = Hub([settings])
        await hub.start()
        try:
            batches = module.Batches(Room(hub, limits), store)
            path = store.new_path()
            path.write_text(lines(("short", body()), *((f"long-{k}", body(**LONG, n=10)) for k in range(9))))
            asked = module.BatchRequest(
                input_file_id=store.add(path, "me", "x", "batch", None).id, endpoint=URL, completion_window="24h"
            )
            record = batches.create(asked, "me")
            await record.task
            assert not hub.tickets
            return record
        finally:
            await hub.close(0)

    record = asyncio.run(run())
    found = Batch.model_validate(record.shown())
    assert found.status == "expired"
    late = results_of(store.of("me", found.error_file_id).path.read_text())
    assert found.request_counts.failed == len(late) == 10 - found.request_counts.completed
    assert {entry["error"]["code"] for entry in late.values()} == {"batch_expired"}
    assert "short" in results_of(store.of("me", found.output_file_id).path.read_text())


def a_room(folder, owners, **limits):
    """A room whose worker is not started, and what keeps its files."""
    from intaglio.runtimes.serve_hub import Hub
    from intaglio.runtimes.serve_limits import Limits
    from intaglio.runtimes.serve_model import ModelSettings
    from intaglio.runtimes.serve_room import Room
    from intaglio.runtimes.serve_store import Store

    hub, found = Hub([ModelSettings(name="one", folder=folder, backend="null")]), Limits(limits)
    return Room(hub, found, owners=owners), Store(found, owners=owners)


def test_of_several_keys_none_leaves_no_room_for_the_others(tmp_path):
    from intaglio.runtimes.serve_errors import BadRequest, TooLarge

    _, store = a_room(serve_stub.hollow(tmp_path / "one"), 2, batch_files=6, batch_held_bytes=100)
    for _ in range(2):
        store.begin("greedy", "x", None)
    with (
        store.arrival("greedy", 0),
        pytest.raises(BadRequest, match="4 is more than the 3"),
        store.arrival("greedy", 0),
    ):
        pass
    with store.arrival("greedy", 50), store.arrival("modest", 50):
        pass
    with pytest.raises(TooLarge, match="51 is more than the 50"), store.arrival("greedy", 51):
        pass
    _, store = a_room(serve_stub.hollow(tmp_path / "two"), 1, batch_held_bytes=100)
    with store.arrival("the only one", 100):
        pass


def test_unfinished_batches_are_few_and_do_not_take_the_threads_of_others(tmp_path, monkeypatch):
    """``batch_unfinished``; a file that takes long to check keeps no other answer waiting, nor a span open."""
    import intaglio.runtimes.serve_batches as module
    from intaglio.runtimes.serve_errors import Busy
    from intaglio.runtimes.serve_metrics import asked

    room, store = a_room(serve_stub.hollow(tmp_path / "one"), 2, batch_unfinished=2)
    go, threads, scopes = threading.Event(), set(), []

    def slow(path, limits):
        threads.add(threading.current_thread().name)
        go.wait(20)
        raise UsageError("that was no file")

    async def run():
        batches = module.Batches(room, store)
        work = batches.work
        batches.work = lambda record: seen(work(record))

        async def seen(made):
            scopes.append(asked.get())
            await made

        path = store.new_path()
        path.write_text("x")
        ident = store.add(path, "me", "x", "batch", None).id
        wanted = module.BatchRequest(input_file_id=ident, endpoint=URL, completion_window="24h")
        asked.set({"of": "the request that asked for it"})
        records = [batches.create(wanted, "me") for _ in range(2)]
        with pytest.raises(Busy, match="3 is more than the 2"):
            batches.create(wanted, "me")
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0) for _ in range(40)))
        assert len(threads) == 1
        go.set()
        await asyncio.gather(*(record.task for record in records))
        assert [record.status for record in records] == ["failed", "failed"]
        await batches.create(wanted, "me").task

    monkeypatch.setattr(module, "RequestFile", slow)
    asyncio.run(run())
    assert threads == {"batches_0"}
    assert scopes == [None] * 3
