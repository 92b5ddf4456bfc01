"""What can go wrong. Contents, in the order of the file:

    Downloads               connections that break, files that change or have another hash
    Damaged files           archives, GLUE's files, checkpoints and shards of ours
    Text that breaks off    while it is read, by one process or several
    Kills and orphans       of the trainer, of its child process and of workers; no process is left behind
    Full disks              in any file, of pre-training and of fine-tuning
    Numbers                 that are not finite
    Bad input               one sentence for each mistake, before anything is trained or overwritten

Helpers are those of test_electra.py, and fixtures come by way of conftest.py.
"""

import fcntl
import gzip
import hashlib
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch

import data
import finetune
import glue
import model
import train
from data import Shards, UserError
from model import ModelError
from test_electra import (
    ARGUMENTS,
    CONFIG,
    GLUE_FILES,
    HERE,
    PRELUDE,
    SMALL_VOCAB,
    STSB,
    STSB_ROW,
    TOKENIZER,
    WEIGHTS,
    Child,
    Handler,
    Server,
    assert_same_run,
    contents,
    data_config,
    fail_at,
    find_network,
    launch,
    make_openwebtext,
    make_tar,
    pretrain,
    pretrain_until_killed,
    read_log,
    read_results,
    read_texts,
    tune,
    watch,
    write_files,
    write_split,
    write_task,
)

# ============================================================================================================
# Downloads


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


def test_a_download_survives_what_goes_wrong_on_the_way(corpus, quick, capfd):
    """Cut, reset, slow and stalled bodies, 429, 503 and redirects: the documents are the same."""
    texts, content = make_openwebtext(1500)
    kinds, random_ = ["cut", "reset", "slow", "stall", 429, 503, "redirect", None], random.Random(0)
    happened, began = [], time.monotonic()

    def fault():
        happened.append(random_.choice(kinds))
        return happened[-1]

    def resumed_at():
        return set(server.ranges_asked) - {""}  # bytes that are not the first

    with Server({"/owt.tar": content}, fault) as server:
        # What a reset loses depends on timing: a few requests more may be needed to break at a second place.
        while set(happened) != set(kinds) or (len(resumed_at()) < 2 and time.monotonic() - began < 50):
            assert read_texts(f"{server.url}/owt.tar", one_document_per_file=True) == texts
        assert len(resumed_at()) >= 2
    assert time.monotonic() - began < 50  # it did not wait for a stalled body
    said = capfd.readouterr().err
    assert re.search(r"owt.tar: \w+, at byte [\d,]+; trying again in 0 s", said)
    assert "it answers 429, at byte" in said


def test_a_download_gives_up_after_ten_minutes(corpus, monkeypatch, capfd):
    """It waits longer from attempt to attempt, a minute at most, and says so; who never answers gets less."""
    slept = []
    monkeypatch.setattr(data.time, "sleep", slept.append)
    with Server({"/a.txt": b""}, lambda: 429) as server:
        with pytest.raises(UserError, match="it answers 429, 16 times in a row; the same command resumes"):
            read_texts(f"{server.url}/a.txt")
    assert slept == [1, 2, 4, 8, 16, 32, *[60] * 9]
    assert capfd.readouterr().err.count("it answers 429, at byte 0; trying again in 60 s") == 9
    with pytest.raises(UserError, match="cannot be read: ConnectionError, 7 times"):
        read_texts(f"{server.url}/a.txt")
    assert sum(slept[15:]) == 63


@pytest.mark.parametrize("error, is_retried", [
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), False),
    (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), True),
])
def test_only_what_can_pass_is_tried_again(quick, monkeypatch, error, is_retried):
    """An unknown host is refused at once; a look-up that fails for now is repeated."""
    attempts = []

    def fail(*args):
        attempts.append(args)
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match="nowhere.example/a.txt cannot be read: ConnectionError"):
        list(data.fetch("https://nowhere.example/a.txt"))
    assert (len(attempts) > 1) == is_retried


def test_files_that_change_or_cannot_be_continued_are_refused(corpus, quick):
    """A file that changes while it is read is noticed; so is a server without ranges. A file may be empty."""
    _, content = make_openwebtext(300)
    files = {"/owt.tar": content, "/empty.txt": b""}
    with Server(files, lambda: "cut") as server:
        reading = data.read_documents(data_config(data=(f"{server.url}/owt.tar",)))
        next(reading)
        files["/owt.tar"] = flip(content, 0)
        with pytest.raises(UserError, match="owt.tar cannot be read from byte [1-9].* on: it has changed"):
            list(reading)
    files["/owt.tar"] = content
    with Server(files, lambda: "cut", has_ranges=False) as server:
        with pytest.raises(UserError, match="the server sends another part"):
            read_texts(f"{server.url}/owt.tar")
        assert read_texts(f"{server.url}/empty.txt") == []
    faults = ["cut", None, "cut"]
    with Server({"/a.txt": b"ba " * 20_000}, lambda: faults.pop(), is_chunked=True) as server:
        assert read_texts(f"{server.url}/a.txt") == [("ba " * 20_000).strip()]  # an unknown length
    assert faults == ["cut"]


class PartHandler(http.server.BaseHTTPRequestHandler):
    """Gives the server's `answers`, (status, body, headers), one after the other."""

    def do_GET(self):
        self.server.ranges_asked.append(self.headers.get("Range"))
        status, body, headers = self.server.answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


K = 1 << 12  # the file is 8 K; the first answer breaks off after 4 K
BODY = b"".join(bytes([65 + number]) * K for number in range(8))
TAG, DATE = {"ETag": '"1"'}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}


def span(begin, total):
    return {"Content-Range": f"bytes {begin}-{8 * K - 1}/{total}"}


OTHER_PART, CHANGED = "the server sends another part", "it has changed"


@pytest.mark.parametrize("first, status, begin, headers, refusal", [
    (TAG, 206, 4 * K, TAG | span(4 * K, 8 * K), None),
    (DATE, 206, 4 * K, DATE | span(4 * K, 8 * K), None),
    (TAG, 206, 2 * K, TAG | span(2 * K, 8 * K), OTHER_PART),  # another position than the one asked for
    (TAG, 206, 4 * K, TAG | span(4 * K, 9 * K), CHANGED),
    (TAG, 206, 4 * K, TAG | span(4 * K, "*"), OTHER_PART),
    (TAG, 206, 4 * K, TAG, OTHER_PART),
    (TAG, 206, 4 * K, {"ETag": '"2"'} | span(4 * K, 8 * K), CHANGED),
    (DATE, 206, 4 * K, {"Last-Modified": "later"} | span(4 * K, 8 * K), CHANGED),
    (TAG, 200, 0, TAG, OTHER_PART),  # the whole instead of a part
    ({}, 206, 4 * K, span(4 * K, 8 * K), "the server does not say whether it has changed"),
    (TAG, 206, 4 * K, TAG | {"Content-Range": f"bytes {4 * K}-{6 * K - 1}/{8 * K}"}, None),  # a smaller part
])
def test_a_part_is_accepted_only_if_it_continues_the_same_file(quick, first, status, begin, headers, refusal):
    """A part comes from the position asked for, with the total and the validator of the first answer."""
    body = BODY[begin : 6 * K if "-24575" in headers.get("Content-Range", "") else None]
    with Server({}) as server:
        server.RequestHandlerClass = PartHandler
        server.answers = [(200, BODY[: 4 * K], first | {"Content-Length": 8 * K}),
                          (status, body, headers | {"Content-Length": len(body)}),
                          (206, BODY[6 * K :], TAG | span(6 * K, 8 * K))]
        if refusal is None:
            assert b"".join(data.fetch(f"{server.url}/a.txt")) == BODY
        else:
            with pytest.raises(UserError, match=f"a.txt cannot be read from byte 16,384 on: {refusal}; use"):
                list(data.fetch(f"{server.url}/a.txt"))
    assert server.ranges_asked[:2] == [None, f"bytes={4 * K}-"]


def test_a_part_that_nobody_asked_for_is_refused():
    """A first answer of status 206 counts only if it begins with the first byte."""
    with Server({}) as server:
        server.RequestHandlerClass = PartHandler
        server.answers = [(206, BODY[2 * K :], TAG | span(2 * K, 8 * K) | {"Content-Length": 6 * K})]
        with pytest.raises(UserError, match="a.txt cannot be read from byte 0 on: the server sends another"):
            list(data.fetch(f"{server.url}/a.txt"))


@pytest.mark.parametrize("headers, message", [
    ({"Content-Encoding": "gzip"}, "a.txt answers with Content-Encoding 'gzip'; use --data PATH"),
    ({"Content-Length": "many"}, "a.txt does not say how long it is; use --data PATH"),
    ({"Content-Length": "1" * 5000}, "a.txt does not say how long it is; use --data PATH"),
    ({}, "a.txt does not say how long it is; use --data PATH"),
    ({"Content-Encoding": "identity", "Content-Length": 2}, None),
])
def test_a_body_whose_end_cannot_be_told_is_refused(headers, message):
    """A stream that is compressed on the way counts as whole when it is cut; we did not ask for one."""
    with Server({}) as server:
        server.RequestHandlerClass = PartHandler
        server.answers = [(200, b"ba", headers)]
        if message is None:
            assert b"".join(data.fetch(f"{server.url}/a.txt")) == b"ba"
        else:
            with pytest.raises(UserError, match=message):
                list(data.fetch(f"{server.url}/a.txt"))


def test_a_part_that_is_longer_than_the_rest_is_refused(quick):
    """What a server sends beyond the end that it announced is not taken for text."""
    with Server({}) as server:
        server.RequestHandlerClass = PartHandler
        rest = BODY[4 * K :] + bytes(9)
        server.answers = [(200, BODY[: 4 * K], TAG | {"Content-Length": 8 * K}),
                          (206, rest, TAG | span(4 * K, 8 * K) | {"Content-Length": len(rest)})]
        with pytest.raises(UserError, match="a.txt sends more than it announces; use --data PATH"):
            list(data.fetch(f"{server.url}/a.txt"))


def test_what_no_repetition_can_mend_is_not_repeated(monkeypatch):
    """A circle of redirects, and https at a port of http, are said at once."""
    monkeypatch.setattr(data.time, "sleep", None)
    with Server({}) as server:
        server.RequestHandlerClass = PartHandler
        server.answers = [(302, b"", {"Location": "/a.txt", "Content-Length": 0})] * 40
        with pytest.raises(UserError, match="a.txt cannot be read: TooManyRedirects; check the address"):
            list(data.fetch(f"{server.url}/a.txt"))
        with pytest.raises(UserError, match="a.txt cannot be read: SSLError; check the address"):
            list(data.fetch(f"{server.url}/a.txt".replace("http:", "https:")))


def test_a_body_that_ends_early_without_an_error_is_noticed(quick, monkeypatch):
    """Whatever the HTTP library says, a whole is taken only with as many bytes as its Content-Length."""
    content = requests.Response.iter_content
    monkeypatch.setattr(requests.Response, "iter_content", lambda *args: itertools.islice(content(*args), 1))
    with Server({"/a.txt": BODY}) as server:
        assert b"".join(data.fetch(f"{server.url}/a.txt")) == BODY
    assert server.ranges_asked == ["", f"bytes={4 * K}-"]
    monkeypatch.setattr(requests.Response, "iter_content", lambda *args: iter(()))
    with Server({"/a.txt": BODY}) as server, pytest.raises(UserError, match="ConnectionError, 7 times"):
        list(data.fetch(f"{server.url}/a.txt"))


@pytest.mark.parametrize("address", ["http://[bad/a.txt", "http://x:port/a.txt", "http://a..b/a.txt", "https:///a.txt",
                                     "http://user:password@a..b/a.txt?signature#fragment"])
def test_what_cannot_be_an_address_is_refused_at_once(monkeypatch, address):
    """No attempt is repeated, and the sentence holds no secret."""
    monkeypatch.setattr(data.time, "sleep", None)
    with pytest.raises(UserError, match="is not the address of a server; use --data") as caught:
        read_texts(address)
    assert not re.search("user|password|signature|fragment", str(caught.value))


@pytest.mark.parametrize("address, shown", [
    ("https://me:pa/ss@host/a.txt", "https://host/a.txt"), ("https://me:p?a#ss@host:1/a.txt", "https://host:1/a.txt"),
    ("https://me:pa/s@s@host/a.txt?b", "https://host/a.txt"), ("https://host:80/@me/a.txt", "https://host:80/@me/a.txt"),
    ("https://host/a.txt?mail=me:x@b", "https://host/a.txt"), ("a?b@c.txt", "a?b@c.txt"),
    ("https://me:pass@host/@me/a.txt?x@y", "https://host/@me/a.txt"), ("https://[::1]:80/a@b", "https://[::1]:80/a@b"),
    ("https://me:a1?@host/a.txt?b@c", "https://host/a.txt"), ("https://me:pass@ho:st/a.txt", "https://ho:st/a.txt"),
])
def test_addresses_are_shown_without_secrets(address, shown):
    """A password may hold signs that should be escaped; an @ elsewhere is no secret."""
    assert data.without_secrets(address) == shown


def test_the_hub_is_named_without_its_password(corpus, monkeypatch):
    """HF_ENDPOINT, too, may hold a user and a password."""
    with Server({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url.replace("//", "//me:secret@"))
        with pytest.raises(UserError, match="^http://127.0.0.1:[0-9]+ does not have OpenWebText"):
            data.choose_openwebtext()


@pytest.mark.parametrize("use", [
    lambda name: data.load_vocab(data_config(vocab=name)),
    lambda name: data.find_model(name, "cache"),
    lambda name: glue.find_tasks([name], False),
])
def test_an_address_where_none_is_taken_is_shown_without_secrets(corpus, use):
    """Vocabularies, models and tasks are files, folders and names."""
    with pytest.raises(UserError, match="https://host/file") as error:
        use("https://me:secret@host/file?secret")
    assert "secret" not in str(error.value)


def test_no_secret_of_an_address_is_printed_or_names_a_file(corpus, quick, capfd):
    """Messages and names of folders hold scheme, host and path; names are bounded."""
    path, faults = f"/{'x' * 300}.txt", [None, None, "cut", 429]
    with Server({path: b"ba\n\xff"}, lambda: faults.pop()) as server:
        config = data_config(data=(server.url.replace("//", "//me:secret@") + f"{path}?secret#secret",))
        folder = data.Shards(config, data.WordPiece(SMALL_VOCAB)).folder.name
        with pytest.raises(UserError, match="is not UTF-8 at byte 0") as not_text:
            list(data.read_documents(config))
        server.files = {}
        with pytest.raises(UserError, match="answers 404") as missing:
            list(data.read_documents(config))
    said = capfd.readouterr().err
    assert "429" in said and len(folder) < 80 and "xxx" in folder
    for message in str(not_text.value), str(missing.value), str(data.no_text(config)):
        assert f"{server.url}/xxx" in message
        said += message
    assert "secret" not in said + folder


def source(server, path, content):
    return f"{server.url}{path}", len(content), hashlib.sha256(content).hexdigest()


def test_glue_is_downloaded_once_and_checked(corpus, quick):
    """A download has the published hash or is refused, and so is a file that was damaged later."""
    with zipfile.ZipFile("WNLI.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("WNLI/dev.tsv", GLUE_FILES["wnli", "dev"][0])
    archive = Path("WNLI.zip").read_bytes()
    with Server({"/WNLI.zip": archive}) as server:
        download = source(server, "/WNLI.zip", archive)
        good = replace(glue.TASKS["wnli"], download=download, num_rows=dict(dev=1))
        wrong = replace(good, download=source(server, "/WNLI.zip", archive[:-1] + b"x"))
        with pytest.raises(UserError, match=r"SHA-256 \w{64} instead of \w{64}; try again, or put WNLI.zip"):
            wrong.read("dev", "cache")
        assert [path.suffix for path in Path("cache/glue").iterdir()] == [".lock"]  # nothing half-written
        assert len(good.read("dev", "cache")[0]) == 1
    glue.fetch_official.cache_clear()  # a new process, and the server is gone
    assert len(good.read("dev", "cache")[0]) == 1
    Path("cache/glue/WNLI.zip").write_bytes(archive[: len(archive) // 2])
    glue.fetch_official.cache_clear()
    with pytest.raises(UserError, match=r"WNLI.zip has SHA-256 \w{64} instead of \w{64}; delete it"):
        good.read("dev", "cache")


def test_the_vocabulary_is_downloaded_once_and_checked(corpus, monkeypatch, quick):
    """A wrong vocabulary is refused with the alternatives; the right one is kept."""
    body = "\n".join(SMALL_VOCAB).encode()
    known = data.BERT_VOCAB | dict(size=len(body), sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(data, "BERT_VOCAB", known)
    path, config = known["address"].removeprefix("hub:"), data_config(vocab="bert")
    with Server({path: body[:-1] + b"x"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(UserError, match="SHA-256 .* instead of .*--vocab FILE"):
            data.load_wordpiece(config)
        server.files = {path: body}
        assert data.load_wordpiece(config).tokens == SMALL_VOCAB
    assert data.load_wordpiece(config).tokens == SMALL_VOCAB  # the server is gone
    Path("cache/bert-uncased-vocab.txt").write_bytes(body + b"\nba")
    with pytest.raises(UserError, match="vocab.txt has SHA-256 .* instead of .*; delete it to download it"):
        data.load_wordpiece(config)
    data.load_wordpiece(data_config(vocab="train:60"))
    [path] = Path("cache").glob("*.vocab")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r", 1))
    with pytest.raises(UserError, match="vocab is damaged; delete it, and it is trained again"):
        data.load_wordpiece(data_config(vocab="train:60"))


@pytest.mark.parametrize("names", [["model.safetensors", "tokenizer_config.json"], ["pytorch_model.bin"]])
def test_a_model_of_the_hub_is_downloaded_once(toy_glue, monkeypatch, quick, names):
    """A name on the hub works like a folder; a wrong name is reported."""
    folder, base = Path("out/small/discriminator"), "/google/electra-toy/resolve/main/"
    torch.save(model.read_safetensors(folder / "model.safetensors"), folder / "pytorch_model.bin")
    files = {f"{base}{name}": (folder / name).read_bytes() for name in ["config.json", "vocab.txt", *names]}
    flags = "--task wnli --model google/electra-toy "
    with Server({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(UserError, match="404 .*check the name: there is no folder google/electra-toy"):
            tune(flags)
        server.files = files
        tune(flags)
    kept = {path.name for path in Path("cache/models/google--electra-toy").iterdir()}
    assert kept == {"config.json", "config.lock", "vocab.txt", *names}
    tune(flags + "--out again")  # the server is gone
    tune("--task wnli --out local")
    assert read_results()["wnli", 0]["metrics"] == read_results("local")["wnli", 0]["metrics"]


def test_weights_in_several_files_are_downloaded(corpus, monkeypatch, quick):
    """The files that the index names are downloaded, each once. A path is not followed out of the folder."""
    base, index = "/a/b/resolve/main/", "model.safetensors.index.json"
    files = {"vocab.txt": b"", "config.json": b"{}", "model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    with Server({f"{base}{name}": content for name, content in files.items()}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        weight_map = {"x": "model-2.safetensors", "y": "model-1.safetensors", "z": "model-2.safetensors",
                      "path": "../a.safetensors"}
        server.files[base + index] = json.dumps({"weight_map": weight_map}).encode()
        folder = data.find_model("a/b", "cache")
    assert {path.name for path in folder.iterdir()} == {*files, index, "config.lock"}
    assert (folder / "model-2.safetensors").read_bytes() == b"2"


def test_the_token_goes_to_the_hub_only(corpus, monkeypatch):
    """HF_TOKEN is sent to the hub's host, and neither to a host it redirects to nor to other addresses."""
    seen = []

    class TokenHandler(Handler):
        def do_GET(self):
            seen.append((self.server is hub, self.headers.get("Authorization")))
            if self.server is hub:
                self.answer(302, headers={"Location": f"{other.url}/a.txt?signed"})
            else:
                super().do_GET()

    monkeypatch.setenv("HF_TOKEN", "token\n")
    with Server({}) as hub, Server({"/a.txt": b"ba"}) as other:
        hub.RequestHandlerClass = other.RequestHandlerClass = TokenHandler
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for address in "hub:/a.txt", f"{hub.url}/a.txt", f"{other.url}/a.txt":
            assert read_texts(address) == ["ba"]
    assert seen == [(True, "Bearer token"), (False, None)] * 2 + [(False, None)]


# ============================================================================================================
# Damaged files


def test_damaged_archives_are_refused_by_name(corpus):
    """Cut archives, flipped bits, web pages: the error names them."""
    texts, content = make_openwebtext()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        second = next(member for member in tar if "00-20_data" in member.name)
    plain = make_tar({f"{n}.txt": b"ba do" for n in range(5)})
    nested = make_tar({"a.tar": b""})
    for _ in range(500):
        nested = make_tar({"a.tar": nested})
    compressed = make_tar({f"{n}.txt": text.encode() for n, text in enumerate(texts)}, "w:gz")
    for name, damaged, message in [
        ("flipped.tar", flip(content, second.offset_data + second.size - 6),  # seen only at its end
         r"flipped.tar/.*subset00-20_data.xz is damaged or cut short"),
        ("cut.tar", content[: second.offset_data + 99], "cut.tar.* is damaged or cut short"),
        ("plain.tar", flip(plain, 1024 + 9), "plain.tar is damaged or cut short"),  # the second header
        ("half.tar", plain[: 1024 + 99], "half.tar is damaged or cut short"),
        ("zeroed.tar", plain[:1024] + bytes(512) + plain[1536:], "zeroed.tar is damaged .*after its end"),
        ("unended.tar", plain[:1024], "unended.tar is damaged or cut short"),
        ("nested.tar", nested, "nested.tar.* is damaged or cut short .*recursion"),
        ("page.tar", b"<!DOCTYPE html><html>Please log in</html>" * 40, "page.tar is damaged or cut short"),
        ("flipped.tar.gz", flip(compressed, len(compressed) - 6), "flipped.tar.gz is damaged"),
        ("cut.tar.gz", compressed[: len(compressed) // 2], "cut.tar.gz.* is damaged or cut short"),
        ("empty.txt.gz", b"", "empty.txt.gz is damaged or cut short .it is empty"),
        ("empty.jsonl.xz", b"", "empty.jsonl.xz is damaged or cut short .it is empty"),
    ]:
        Path(name).write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            read_texts(name)


@pytest.mark.parametrize("name, content, message", [
    ("cola", b"gj04\t1\t\tA.\n", "CoLA/train.tsv has 1 rows and not 2: it was cut or edited"),
    ("cola", b"gj04\t1\t\tA.\ngj04\t2\t\tB.\n", "train.tsv, line 2: the label is '2' and not one of 0, 1"),
    ("cola", b"gj04\t1\t\tA.\ngj04\t1\t\tA\tB.\n", "train.tsv has 1 rows and not 2"),
    ("cola", b"<html>\n", "train.tsv has 0 rows and not 2"),
    ("sst2", b"<html>\n", "SST-2/train.tsv, line 1 has no column sentence; it was damaged or edited"),
    ("stsb", f"{STSB}\tscore\n{STSB_ROW}A\tB\tC\n".encode(), "line 2: the label is 'C' and not a number"),
    ("stsb", f"{STSB}\tscore\n{STSB_ROW}A\tB\t1_0\n".encode(), "line 2: the label is '1_0' and not a number"),
])
def test_damaged_glue_files_are_refused(name, content, message, corpus, monkeypatch):
    """A TSV that was cut, edited or replaced is named."""
    monkeypatch.setitem(glue.TASKS[name].num_rows, "train", 2)
    write_split(name, "train", content)
    with pytest.raises(UserError, match=message):
        glue.TASKS[name].read("train", "cache", "glue")


def test_damaged_files_of_ours_and_a_folder_in_use_are_reported(corpus):
    """A damaged checkpoint or shard says what to do; two processes do not train in one folder."""
    pretrain("--num-train-steps 2")
    with (data.try_lock(Path("out/small/lock")),
          pytest.raises(UserError, match="another process is training in out/small")):
        pretrain("--num-train-steps 2")
    path = Path("out/small/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="checkpoint.pt is damaged; --restart starts over"):
        pretrain("--num-train-steps 2")


@pytest.mark.parametrize("name, spoil, message", [
    ("shard-000000.npz", None, "is missing"), ("shard-000003.npz", None, "is missing"),
    ("shard-000001.npz", lambda content: content[:-50], "is damaged"),
    ("shard-000001.npz", lambda content: flip(content, len(content) // 2), "is damaged"),
    ("shard-000001.npz", lambda content: b"", "is damaged"),
    ("shard-000001.npz", lambda _: Path("shard-000002.npz").read_bytes(), "is damaged"),  # in another's place
    ("shard-000001.npz", lambda _: Path("shard-000001.npz").read_bytes(), "was replaced by another shard"),
    ("complete", lambda content: content[:-1], "is damaged"),
    ("complete", lambda content: flip(content, 20), "is damaged"),
    ("complete", lambda content: b"", "is damaged"),
])
def test_a_cache_is_what_it_says_or_refused_by_name(corpus, name, spoil, message):
    """A file of the cache that is lost or changed is named; the folder, once deleted, is made again."""
    shards = data.prepare(data_config())
    whole = contents(shards)
    shutil.copy(shards.path(2), ".")
    shutil.copy(data.prepare(data_config(seed=1)).path(1), ".")
    path = shards.folder / name
    content = path.read_bytes()
    path.unlink()
    if spoil:
        path.write_bytes(spoil(content))
    sentence = f"{path} {message}; delete its folder, and it is made again"
    with pytest.raises(UserError, match=re.escape(sentence)):
        shards = data.prepare(data_config())
        for number in range(len(shards.infos)):
            shards.load("train", number)
    shutil.rmtree(shards.folder)
    assert contents(data.prepare(data_config())) == whole


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_shard_that_is_gone_from_a_growing_cache_is_made_again(corpus, number):
    """Whichever it is, nothing waits for it, and the cache ends in the same bytes."""
    shards = data.prepare(data_config())
    whole = contents(shards)
    (shards.folder / "complete").unlink()
    shards.path(range(len(shards.infos))[number]).unlink()
    assert contents(data.prepare(data_config())) == whole


def everything(folder):
    """The bytes of each file in a folder, apart from locks."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("damage", [
    lambda content: flip(content, len(content) // 2), lambda content: flip(content, len(content) - 1),
    lambda content: flip(content, 0), lambda content: content[:-1], lambda content: content + b"0",
    lambda content: content[:-data.SEAL_BYTES], lambda content: b""])  # the last but one is the former format
def test_any_other_bit_of_a_checkpoint_is_refused(corpus, damage):
    """Nothing is loaded from a checkpoint that was changed, and nothing else is touched."""
    pretrain("--num-train-steps 2")
    path = Path("out/small/checkpoint.pt")
    path.write_bytes(damage(path.read_bytes()))
    before = everything("out")
    for flags in "", "--eval-only":
        with pytest.raises(UserError, match="checkpoint.pt is damaged; .*--init out/small") as error:
            pretrain(f"--num-train-steps 2 {flags}")
        assert "\n" not in str(error.value) and everything("out") == before


def test_a_run_is_its_checkpoint(corpus):
    """What --init and a trained vocabulary gave a run is in it; networks and log are made good from it."""
    pretrain("--vocab train:60 --out first --num-train-steps 4")
    shape = re.compile(r"--(vocab|\S+-size|num-[ah]\S+|max-position\S+) \S+")
    flags = shape.sub("", ARGUMENTS) + "--batch-size 8 --init first/small"
    train.main(f"{flags} --out whole".split())
    pretrain("--vocab train:60 --out whole/of-vocab")
    for out, command in ("out", flags), ("out/of-vocab", ARGUMENTS + "--vocab train:60"):
        with pytest.raises(OSError, match="No space left on device: .*log.jsonl"), \
                pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fail_at("log.jsonl", 12))
            train.main(f"{command} --out {out}".split())
    for gone in "first", "cache", "out/small/generator", "out/of-vocab/small/discriminator":
        shutil.rmtree(gone)
    Path("out/of-vocab/small/generator/model.safetensors").write_bytes(b"cut")
    train.main(f"{flags} --out out".split())
    train.main(f"{ARGUMENTS} --vocab train:60 --out out/of-vocab".split())
    for one, other in ("out", "whole"), ("out/of-vocab", "whole/of-vocab"):
        assert_same_run(one, other)
        before = everything(f"{one}/small")
        shutil.rmtree(f"{one}/small/discriminator")
        Path(f"{one}/small/generator/config.json").unlink()
        with open(f"{one}/small/log.jsonl", "ab") as log:
            log.write(b'{"split": "train", "step": 25}\n{"spl')
        train.main(f"{flags if one == 'out' else ARGUMENTS + '--vocab train:60'} --out {one}".split())
        assert everything(f"{one}/small") == before
    for change, message in ("--vocab train:61", "vocab was"), ("--seed 1", "seed was 0"):
        with pytest.raises(UserError, match=f"holds another run .*{message}"):
            pretrain(f"--vocab train:60 --out out/of-vocab {change}")
    with pytest.raises(UserError, match="init was .'first/small'. and is now .'whole/small'"):
        train.main(f"{flags} --out out --init whole/small".split())


def test_a_log_that_was_lost_or_cut_goes_on(corpus):
    """Lines up to the checkpoint's step stay, and the settings come first, whatever was lost or damaged."""

    def fail(*args):
        raise OSError

    pretrain("--num-train-steps 8 --out whole")
    path = Path("out/small/log.jsonl")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", fail_at("log.jsonl", 5))
        pretrain("--num-train-steps 8")
    kept = path.read_bytes()
    settings, _, others = kept.partition(b"\n")
    for content in (kept, kept[:-40], b"\xff\x00", None, others, settings[1:] + b"\n" + others,
                    b"[" * 200_000 + b"\n1\n" + others, others + settings):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        pretrain("--num-train-steps 8 --eval-only")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
            watch(patch, train, "train", fail)
            pretrain("--num-train-steps 8")
        lines, whole = ([line for line in read_log(folder) if "numerics" not in line]  # lost, they come later
                        for folder in ("out/small", "whole/small"))
        assert lines[0]["settings"]["batch_size"] == 8 and lines == whole[: len(lines)]
        assert sum("numerics" in line for line in read_log()) == 1


def test_a_new_run_needs_a_folder_without_a_run(corpus):
    """Without its checkpoint a run is not overwritten; --restart deletes what the program wrote, no more."""
    pretrain("--num-train-steps 4")
    path = Path("out/small")
    (path / "checkpoint.pt").unlink()
    write_files(path, {"generator/README.md": b"mine", "step-1/notes.txt": b"mine", "step-9/a.b": b"mine",
                       "step-1-mine/generator/config.json": b"mine", "generator/tokenizer.json": b"{}"})
    write_files("elsewhere", {"generator/config.json": b"mine"})
    (path / "step-8").symlink_to(Path("elsewhere").resolve())
    before = everything("out")
    for flags in "", "--seed 1", "--num-train-steps 2":
        with pytest.raises(UserError, match="no checkpoint.pt, but generator/config.json; .* --restart"):
            pretrain(f"--num-train-steps 4 {flags}")
        assert everything("out") == before
    pretrain("--num-train-steps 2 --restart --objective mlm")
    names = {str(path.relative_to("out/small")) for path in everything("out")}
    assert not [name for name in names if "discriminator" in name or name.startswith("step-3")]
    assert {"step-1/notes.txt", "step-9/a.b", "generator/README.md", "generator/vocab.txt",
            "step-1-mine/generator/config.json"} <= names
    assert Path("elsewhere/generator/config.json").exists()
    assert "generator/tokenizer.json" not in names  # its rules would outweigh those of the run


def test_a_run_goes_on_with_more_text_but_not_with_other_text(corpus):
    """Text after what a run has read may change."""
    text = Path("corpus.txt").read_text()
    flags = "--num-train-steps 8 --eval-every 99"
    pretrain(f"{flags} --out whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", fail_at("log.jsonl", 5))
        pretrain(flags)
    Path("corpus.txt").write_text(text + "\n\nba do ku")
    pretrain(f"{flags} --eval-only")
    Path("corpus.txt").write_text(text.replace("ba", "do", 1))
    with pytest.raises(UserError, match="another run .the text differs in corpus.txt or after it"):
        pretrain(flags)
    Path("corpus.txt").write_text(text + "\n\nba do ku")
    pretrain(flags)
    assert read_log(split="train") == read_log("whole/small", "train")


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 1000, "hidden_size": 60_000}, {"vocab_size": 60_000},
    {"hidden_size": "48"}, {"hidden_size": 48.5}, {"hidden_size": None}, {"vocab_size": 0},
    {"layer_norm_eps": math.nan}, {"layer_norm_eps": math.inf}, {"num_attention_heads": 0}, {"objective": []},
    {"initializer_range": 0}, {"hidden_dropout_prob": True}])
def test_a_config_that_cannot_be_is_refused_before_a_network_is_built(tmp_path, change, monkeypatch):
    """The numbers in config.json are looked at, and compared with the weights, first."""
    write_files(tmp_path, model.pretrained_files(model.Discriminator(CONFIG)))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(ModelError, match=f"{tmp_path}.* is damaged"):
        model.load_electra(tmp_path, tmp_path, data.WordPiece(SMALL_VOCAB))


@pytest.mark.parametrize("change", [
    {"shape": [200, 41]}, {"shape": "ab"}, {"shape": None}, {"dtype": "F8"},
    {"data_offsets": [0, 10**12]}, {"data_offsets": [8, 0]},
    {"data_offsets": [10**9, 10**9 + 32_000]}, {"data_offsets": None}])
def test_a_header_of_weights_that_lies_is_refused(tmp_path, change):
    """Places, sizes and types in the header of a safetensors file must fit each other and the file."""
    files = model.pretrained_files(model.Discriminator(CONFIG))
    size, = struct.unpack_from("<Q", files[WEIGHTS])
    header = json.loads(files[WEIGHTS][8 : 8 + size])
    header["electra.embeddings.word_embeddings.weight"] |= change
    text = json.dumps(header).encode()
    write_files(tmp_path, files | {WEIGHTS: struct.pack("<Q", len(text)) + text + files[WEIGHTS][8 + size :]})
    with pytest.raises(ModelError, match=f"{tmp_path}.* (is damaged|does not fit)"):
        model.load_weights(model.Discriminator(CONFIG), tmp_path)


def test_a_flipped_bit_in_exported_weights_is_refused(tmp_path):
    """The header has a SHA-256 of the tensors; a file without one, as others write it, is taken."""
    files = model.pretrained_files(model.Discriminator(CONFIG))
    content = files[WEIGHTS]
    write_files(tmp_path, files | {WEIGHTS: flip(content, len(content) - 99)})
    with pytest.raises(ModelError, match=f"{tmp_path}/{WEIGHTS} is damaged, .*SHA-256"):
        model.load_weights(model.Discriminator(CONFIG), tmp_path)
    write_files(tmp_path, {WEIGHTS: content.replace(b'"sha256"', b'"sha_56"', 1)})
    model.load_weights(model.Discriminator(CONFIG), tmp_path)


def test_a_restart_that_was_cut_short_leaves_no_run(corpus, monkeypatch):
    """Killed while it deletes, --restart leaves a folder that only --restart takes, and nothing half done."""
    pretrain("--num-train-steps 4 --out whole")
    pretrain("--num-train-steps 4")
    unlink, count = Path.unlink, itertools.count()

    def fail(path, **kwargs):
        if path.is_relative_to("out/small") and next(count) == 3:
            raise KeyboardInterrupt
        unlink(path, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", fail)
        pretrain("--num-train-steps 4 --restart")
    with pytest.raises(UserError, match="out/small has no checkpoint.pt, but .* --restart, which deletes it"):
        pretrain("--num-train-steps 4")
    pretrain("--num-train-steps 4 --restart")
    assert_same_run("out", "whole")


# ============================================================================================================
# Text that breaks off


def use_small_shards(command, popen=subprocess.Popen, **kwargs):
    """Popen, but with a child process that makes small shards."""
    return popen([word.replace(data.__file__, "child.py") for word in command], **kwargs)


SMALL = f"{PRELUDE}\n{inspect.getsource(use_small_shards)}\nsubprocess.Popen = use_small_shards\n"


@pytest.fixture
def streaming(corpus, monkeypatch):
    """The address of OpenWebText on a server that fails now and then; the child process has two workers."""
    monkeypatch.undo()
    monkeypatch.chdir(corpus)
    monkeypatch.setattr(data, "SHARD_CHARACTERS", 10_000)
    settings = "data.SHARD_CHARACTERS, data.WORKERS = 10_000, 2"
    main = "if __name__ == '__main__':\n    sys.exit(data.run_as_child())"  # workers import it, too
    Path("child.py").write_text(f"import sys, data\n{settings}\n{main}\n")
    monkeypatch.setattr(subprocess, "Popen", use_small_shards)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    _, content = make_openwebtext()
    random_ = random.Random(0)
    with Server({"/owt.tar": content}, lambda: random_.choice(["cut", 503, None, None])) as server:
        yield f"{server.url}/owt.tar"


def test_the_childs_own_sentence_stops_the_training_which_saves(streaming):
    """The user reads the child process's error, and what was trained before it is saved."""
    with pytest.raises(UserError, match="nothing.tar answers 404 Not Found"):
        pretrain(f"--data {streaming.replace('owt', 'nothing')}")
    assert not Path("out/small/checkpoint.pt").exists()
    content = make_openwebtext()[1]
    Path("cut.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut.tar.* is damaged or cut short"):
        pretrain("--data cut.tar --num-train-steps 100000 --save-every 100000")
    assert torch.load("out/small/checkpoint.pt", weights_only=True)["step"] > 3


def test_a_warning_about_the_end_of_a_growing_text_is_given(streaming, capsys):
    """Its beginning is fine when training starts; what lies in later shards is described after it."""
    log = Path("out/small/log.jsonl")

    def wait_for_a_step():
        while not log.exists() or b'"train"' not in log.read_bytes():
            time.sleep(0.05)

    Path("corpus.txt").write_text("ba do ku\n\n" * 9000)
    with Server({"/later.txt": "ж щ ю\n\n".encode() * 9000}, wait_for_a_step) as server:
        pretrain(f"--data corpus.txt {server.url}/later.txt --num-train-steps 60")
    first, second = re.findall(r"([0-9.]+)% of the rest are \[UNK\]", capsys.readouterr().out)
    assert float(first) == 0 and float(second) > 40


def test_ctrl_c_while_text_is_waited_for_saves_at_once(streaming):
    """The rows run out before the text does; Ctrl-C ends the wait, and what was trained is saved."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = Path("out/small/log.jsonl")

    def interrupt():
        size = -1
        while not log.exists() or log.stat().st_size > size:
            size = log.stat().st_size if log.exists() else -1
            time.sleep(0.5)
        interrupted.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    interrupted = []
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with (Server({"/slow.txt": Path("corpus.txt").read_bytes()}, lambda: "stall") as server,
          pytest.raises(UserError, match="stopped after step [0-9]+; the same command resumes") as error):
        pretrain(f"--data {server.url}/slow.txt --num-train-steps 100000 --save-every 100000 "
                 "--eval-every 100000")
    assert time.monotonic() - interrupted[0] < 3
    thread.join()
    step = int(re.search(r"step (\d+)", str(error.value))[1])
    assert torch.load("out/small/checkpoint.pt", weights_only=True)["step"] == step > 3


def test_what_stops_one_rank_while_text_is_waited_for_stops_all(streaming):
    """Text that breaks in the middle ends both ranks with its sentence, when rank 0 has saved."""
    content = make_openwebtext()[1]
    Path("cut.tar").write_bytes(content[: len(content) // 2])
    flags = "--data cut.tar --num-train-steps 100000 --save-every 100000 SLOW_SAVE"
    status, printed = launch(2, flags, before=SMALL).finish()
    assert status == 1, printed
    assert len(re.findall("cut.tar.* is damaged or cut short", printed)) == 2, printed
    assert torch.load("out/small/checkpoint.pt", weights_only=True)["step"] > 3


def test_an_error_in_the_text_comes_after_the_shards_before_it(corpus, monkeypatch):
    """With workers and without, the sentence is the same, and no shard before it is lost."""
    with open("corpus.txt", "ab") as file:
        file.write(b"\n\nba\xff")
    found = []
    for workers in 1, 2:
        monkeypatch.setattr(data, "WORKERS", workers)
        with pytest.raises(UserError, match="corpus.txt, line .*, is not UTF-8 at byte 2") as error:
            data.prepare(data_config(cache=f"cache{workers}"))
        shards = {path.name: path.read_bytes() for path in Path(f"cache{workers}").rglob("shard-*")}
        found.append((str(error.value), shards))
    assert found[0] == found[1] and len(shards) > 4


def test_text_that_changes_while_it_is_read_gives_no_complete_cache(corpus, monkeypatch):
    """What was read is compared with what is there before each shard, and before the cache is complete."""
    Path("whole").mkdir()
    shutil.copy2("corpus.txt", "whole")
    with monkeypatch.context() as patch:
        watch(patch, Shards, "add", lambda *args: Path("corpus.txt").write_text("other text"))
        with pytest.raises(UserError, match="corpus.txt changed while it was being read"):
            data.prepare(data_config())
    assert not list(Path("cache").rglob("shard-*"))
    os.replace("whole/corpus.txt", "corpus.txt")
    with monkeypatch.context() as patch:
        watch(patch, data, "hash_files", lambda *args: Path("corpus.txt").write_text("other text"))
        with pytest.raises(UserError, match="the text changed while it was being read"):
            data.prepare(data_config())
    assert not list(Path("cache").rglob("complete"))
    with monkeypatch.context() as patch:
        watch(patch, data, "add_ideographs", lambda *args: Path("corpus.txt").write_text("ba ku"))
        with pytest.raises(UserError, match="the text changed while it was being read"):
            data.load_wordpiece(data_config(vocab="train:50"))
    assert not list(Path("cache").rglob("*.vocab"))


@pytest.mark.parametrize("changed", [lambda text: text[99:], lambda text: text[:99],
                                     lambda text: b"ba " + text])
def test_an_address_whose_text_changed_after_a_kill_is_refused(corpus, monkeypatch, changed):
    """A cache that grows goes on only with a text that begins as before; the text itself says so."""
    text = Path("corpus.txt").read_bytes()
    with Server({"/a.txt": text}) as server:
        config = data_config(data=(f"{server.url}/a.txt",))
        expected = contents(data.prepare(replace(config, cache="whole")))
        monkeypatch.setattr(os, "fsync", fail_at("shard-", 3))
        with pytest.raises(OSError, match="No space left"):
            data.prepare(config)
        server.files["/a.txt"] = changed(text)
        with pytest.raises(UserError, match="a.txt has changed since its beginning was prepared; use"):
            data.prepare(config)
        server.files["/a.txt"] = text
        assert contents(data.prepare(config)) == expected


# ============================================================================================================
# Kills and orphans


def test_resume_after_sigkill_ends_in_the_same_bits(corpus):
    """Killed in a shard, the log, a checkpoint and a restart, a run ends in the same bits."""
    pretrain("--out whole")
    flags = "--out killed --cache cache2 "
    for victim, count in ("shard-", 2), ("log.jsonl", 5), ("checkpoint.pt", 1), ("log.jsonl", 4):
        pretrain_until_killed(flags, victim, count)
    pretrain(flags)
    assert_same_run("killed", "whole")
    flags += "--learning-rate 0.1 "
    pretrain_until_killed(flags + "--restart", "checkpoint.pt", 0)  # it left no checkpoint of the run before
    pretrain(flags)
    pretrain(flags + "--out fresh")
    assert_same_run("killed", "fresh")


def kill_when(flags, is_time):
    """Pre-train with small shards until `is_time()`, and kill it; whether that was before its end."""
    child = Child(SMALL + "train.main(sys.argv[1:])", *ARGUMENTS.split(), *flags.split())
    deadline = time.monotonic() + 60
    while child.is_running() and not is_time() and time.monotonic() < deadline:
        time.sleep(0.002)
    child.process.kill()
    return child.finish()[0] == -signal.SIGKILL


def test_trainer_and_child_killed_in_the_stream_end_in_the_same_bits(streaming):
    """Training begins with the first shard; killed while the rest arrives, it ends in the same bits."""
    pretrain(f"--data {streaming} --out whole")
    flags = f"--data {streaming} --out killed --cache cache2"
    assert kill_when(flags, lambda: len(list(Path("cache2").glob("owt*/shard-*.npz"))) >= 2)
    log = Path("killed/small/log.jsonl")
    assert kill_when(flags, lambda: log.exists() and log.read_bytes().count(b"\n") >= 6)
    pretrain(flags)
    assert_same_run("killed", "whole")
    one, other = (data.prepare(data_config(data=(streaming,), cache=cache)) for cache in ("cache", "cache2"))
    assert contents(one) == contents(other)


def children(pid):
    """The processes that a process has started."""
    with suppress(FileNotFoundError):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []


def test_no_child_and_no_worker_outlives_its_parent(streaming):
    """The child process ends when its parent is killed, and its workers with it."""
    with Server({"/silent.txt": Path("corpus.txt").read_bytes()}, lambda: "stall") as server:
        script = f"""{SMALL}
config = data.DataConfig(data=["{server.url}/silent.txt"], vocab="vocab.txt", max_length=32)
with data.GrowingShards(config, data.load_wordpiece(config)).prepare_in_child():
    signal.pause()"""
        parent = subprocess.Popen([sys.executable, "-c", script])
        pids = []
        while len(pids) < 4:  # the child, two workers, and a helper of multiprocessing
            time.sleep(0.01)
            own = children(parent.pid)
            pids = own + [pid for child in own for pid in children(child)]
        parent.kill()
        parent.wait()
    executables, deadline = [Path(f"/proc/{pid}/exe") for pid in pids], time.monotonic() + 10
    while any(path.exists() for path in executables) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(path.exists() for path in executables)


def test_workers_make_the_same_bytes_and_one_that_is_killed_is_reported(corpus, monkeypatch):
    """Two workers make the shards of one process; after a worker's death the same command resumes."""
    Path("owt.tar").write_bytes(make_openwebtext(300)[1])
    config = data_config(data=("owt.tar",))
    expected = contents(data.prepare(config))
    monkeypatch.setattr(data, "WORKERS", 2)
    config = replace(config, cache="cache2")

    def kill_a_worker(shards, *args):
        if len(shards.infos) == 1:
            multiprocessing.active_children()[0].kill()

    with monkeypatch.context() as patch:
        watch(patch, Shards, "add", kill_a_worker)
        with pytest.raises(UserError, match="prepares text was killed or failed; run the same command again"):
            data.prepare(config)
    assert 1 < len(list(Path("cache2").rglob("shard-*.npz"))) < len(expected) - 1
    assert contents(data.prepare(config)) == expected
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not multiprocessing.active_children()


# ============================================================================================================
# Full disks


@pytest.mark.parametrize("victim", ["shard-", "checkpoint.pt", "log.jsonl"])
def test_a_full_disk_loses_nothing_and_the_same_command_resumes(corpus, monkeypatch, victim):
    """The system's error is the message; after it, the run ends in the same bits."""
    pretrain("--out whole")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_at(victim, 2))
        with pytest.raises(OSError, match="No space left on device"):
            pretrain("--cache cache2")
    assert not list(Path(".").rglob("*.tmp"))
    pretrain("--cache cache2")
    assert_same_run("out", "whole")


@pytest.mark.parametrize("victim", ["results.jsonl", ".npz"])
def test_finished_seeds_survive_and_are_never_repeated(toy_glue, monkeypatch, capsys, victim):
    """A full disk costs the seed that it cuts short; the same command does that again, and no other."""
    sweep, path = "--task wnli --seeds 2 --keep-predictions ", Path("out/glue/results.jsonl")
    tune(sweep + "--out whole")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_at(victim, 1))
        with pytest.raises(OSError, match="No space left on device"):
            tune(sweep)
    first, _ = path.read_bytes().split(b"\n")
    assert not list(Path("out").rglob("*.tmp"))
    tune(sweep)
    lines = path.read_bytes()
    assert read_results() == read_results("whole") and lines.startswith(first)
    monkeypatch.setattr(finetune.Finetuner, "run", None)  # it is not called again
    capsys.readouterr()
    tune("--task WNLI --seeds 2 --keep-predictions")
    assert "WNLI " in capsys.readouterr().out and path.read_bytes() == lines


# ============================================================================================================
# Numbers that are not finite


def test_what_is_not_finite_stops_the_run_before_it_is_saved(corpus, monkeypatch):
    """The last finite checkpoint stays, and the likely cause is named."""

    def spoil(optimizer):
        parameter = optimizer.param_groups[0]["params"][0]
        if optimizer.state[parameter]["step"] >= 1e6 + 9:
            parameter.data.fill_(math.nan)

    watch(monkeypatch, torch.optim.AdamW, "step", spoil)
    message = "the weights are not finite after step 12, .* --restart with a lower --learning-rate"
    with pytest.raises(UserError, match=message):
        pretrain()
    state = torch.load("out/small/checkpoint.pt", weights_only=True)
    assert state["step"] == 8 and all(value.isfinite().all() for value in state["model"].values())
    assert read_log(split="train")[-1]["loss"] is None  # NaN is not JSON
    with pytest.raises(UserError, match="the weights are not finite after step 10"):
        pretrain("--num-train-steps 40 --out other --save-every 40")  # a snapshot comes before a checkpoint
    assert not Path("other/small/step-10/generator/config.json").exists()


# ============================================================================================================
# Bad input


@pytest.mark.parametrize("flags, content, message", [
    ("--data nowhere", None, "there is no nowhere; --data takes"),
    ("--data blank.txt", b"\n \n\n", "there is no text to train on in blank.txt"),
    ("--data odd.pdf", b"", "odd.pdf cannot be read; it is no .txt, .jsonl, .json, .parquet or .tar file"),
    ("--data pipe.txt", None, "pipe.txt is not a regular file; copy what it gives to one"),
    ("--data pipes", None, "pipes/pipe.txt is not a regular file"),
    ("--data /dev/zero", None, "/dev/zero is not a regular file"),
    ("--data folder", None, "folder holds no .txt, .jsonl, .json, .parquet or .tar file"),
    ("--data .", None, "out is in ., so that its files would be read as text; use"),
    ("--data folder --cache folder/cache", None, "folder/cache is in folder, so that its files"),
    ("--data cut.txt.gz", gzip.compress(b"ba " * 999, mtime=0)[:-9], "cut.txt.gz is damaged or cut short"),
    ("--data latin.txt", "ba\nbé".encode("latin-1"), "latin.txt, line 2, is not UTF-8 at byte 1"),
    ("--data sjis.txt", "ba\nか".encode("iso-2022-jp"), "sjis.txt, line 2, is not UTF-8 at byte 0; convert"),
    ("--data wide.txt", "ba ba".encode("utf-16-le"), "wide.txt, line 1, is not UTF-8 at byte 1; convert"),
    ("--data a.jsonl", b'{"text": "ba", "text": "do"}', "line 1, is damaged: .*it has the key 'text' more"),
    ("--data a.jsonl", b"[" * 99_999, "a.jsonl, line 1, is damaged: it is not a JSON object"),
    ("--data a.jsonl", b'{"text": "ba"}\n{"no": 1}\n', 'a.jsonl, line 2, has no string under "text"'),
    ("--vocab bad.txt", b"[PAD]\n[UNK]\n[CLS]\na", r"must begin with \[PAD\] and hold"),
    ("--vocab bad.txt", "\n".join([*SMALL_VOCAB, "ba"]).encode(), "bad.txt holds 'ba' more than once; keep"),
    ("--vocab nowhere.txt", None, "there is no vocabulary nowhere.txt"),
    ("--vocab folder", None, "there is no vocabulary folder"),
    ("--vocab pipe.txt", None, "there is no vocabulary pipe.txt"),
    ("--max-length 33", None, "max_length 33 is beyond the model's 32 positions"),
    ("--max-length 4", None, "max_length is 4; it must be between 8 and 1000000"),
    ("--seed -1", None, "seed is -1; it must be between 0 and 4294967295"),
    ("--micro-batch-size 3", None, "batch_size 8 must be a multiple of 3, the number of processes"),
    ("--batch-size 0", None, "batch_size is 0; it must be between 1 and"),
    ("--hidden-size 33", None, "hidden_size 33 is not a multiple of num_attention_heads 2"),
    ("--hidden-dropout-prob 2", None, "hidden_dropout_prob is 2.0; it must be between 0 and 0.9"),
    ("--objective bert", None, "there is no objective bert; there are electra and mlm"),
    ("--size huge", None, "there is no size huge; there are tiny, small, base, large"),
    ("--learning 1", None, "there is no --learning 1; --help lists the flags"),
    ("--batch-size many", None, "invalid int value: 'many'"),
    ("--dtype fp8", None, "cpu does not compute in fp8; --dtype takes fp32, bf16, fp16"),
    ("--device tpu", None, "there is no device tpu here"),
])
def test_bad_input_to_pre_training(corpus, flags, content, message):
    """Each mistake ends in one sentence, before anything is trained."""
    Path("folder").mkdir()
    Path("pipes").mkdir()
    os.mkfifo("pipe.txt")
    os.mkfifo("pipes/pipe.txt")
    if content is not None:
        Path(flags.split()[1]).write_bytes(content)
    with pytest.raises((UserError, ModelError), match=message) as error:
        pretrain(flags)
    assert "\n" not in str(error.value)
    left = {path.name for path in Path(".").rglob("*")}
    assert not left & {"checkpoint.pt", "log.jsonl", "complete"} and not list(Path(".").rglob("*.tmp"))


def tokenizer_json(tokens, lowercase, strip_accents=None):
    """A tokenizer.json as transformers writes it, as far as it is read."""
    normalizer = dict(type="BertNormalizer", lowercase=lowercase, strip_accents=strip_accents)
    return json.dumps(dict(model=dict(vocab=dict(zip(tokens, itertools.count()))), normalizer=normalizer,
                           pre_tokenizer=dict(type="BertPreTokenizer"))).encode()


QUERY = "electra.encoder.layer.0.attention.self.query.weight"
# A header that promises 8 bytes, and 4 of them.
CUT_SHORT = struct.pack("<Q", 61) + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}1234'


@pytest.mark.parametrize("flags, changes, message", [
    ("--task squad", {}, "there is no task squad; there are cola, sst2, mrpc, .* wnli, all, and folders"),
    ("--model nowhere", {}, "there is no model in nowhere; pre-train one with .*google/electra-small"),
    ("--max-length 65", {}, "out/small/discriminator has 64 positions; use --max-length 64 or less"),
    ("--seeds 0", {}, "seeds is 0; it must be between 1 and"), ("--max-length 2", {}, "max_length is 2"),
    ("--learning-rate -1", {}, "learning_rate is -1.0; it must be between 0 and 1"),
    ("--warmup-proportion nan", {}, "warmup_proportion is nan"), ("--dropout 0.99", {}, "dropout is 0.99"),
    ("--task cola rte wnli --glue-dir part", {}, "there is no part/RTE/train.tsv; --glue-dir takes a folder"),
    ("--predict-file a.tsv --model out/small/discriminator", {}, "has no Classifier; --model takes"),
    ("", {"config.json": None}, "there is no model in out/small/discriminator; pre-train one"),
    ("", {"config.json": b"{"}, "config.json is damaged, or not the config of a network"),
    ("", {"config.json": b'{"model_type": "bert"}'}, "model_type, .* are .'bert', 'gelu'"),
    ("", {"config.json": b'{"model_type": "electra", "position_embedding_type": "relative_key"}'},
     "'gelu', 'relative_key'., and should be electra, gelu and absolute"),
    ("", {"vocab.txt": None}, "is not a model folder: it has neither vocab.txt nor tokenizer.json"),
    ("", {"vocab.txt": b"\n".join([b"[PAD]", b"[UNK]", b"[CLS]", b"[SEP]", b"[MASK]"])},
     "word_embeddings.weight has shape .48, 40., and should have .5, 40."),
    ("", {"vocab.txt": None, "tokenizer.json": b'{"model": {"vocab": {"a": 1}}}'}, "is not a WordPiece tok"),
    ("", {TOKENIZER: b"[]"}, "tokenizer_config.json is damaged: it is not a JSON object"),
    ("", {TOKENIZER: b"[" * 99_999}, "tokenizer_config.json is damaged: it is not a JSON object"),
    *[("", {"vocab.txt": None, "tokenizer.json": content}, "tokenizer.json is not a WordPiece tokenizer") for
      content in [b"{}", b'{"model": 1}', b'{"model": {"vocab": 1}}', b'{"model": {"vocab": [["a", 0]]}}',
                  b'{"model": {"vocab": {"a": "x", "b": 0}}}']],
    ("", {"tokenizer.json": tokenizer_json(SMALL_VOCAB, False)},
     "tokenizer_config.json and .*tokenizer.json disagree about do_lower_case; correct the wrong one"),
    ("", {"tokenizer.json": tokenizer_json(SMALL_VOCAB, True, False)}, "json disagree about strip_acc"),
    ("", {"tokenizer.json": tokenizer_json(SMALL_VOCAB[:-1], True)},
     "vocab.txt and .*tokenizer.json hold different vocabularies; delete the wrong one"),
    ("", {TOKENIZER: b'{"tokenize_chinese_chars": false}'}, "that this tokenizer lacks"),
    ("", {WEIGHTS: None}, "has neither model.safetensors nor pytorch_model.bin"),
    ("", {WEIGHTS: CUT_SHORT}, "is damaged or inconsistent: .* weights have 73 bytes"),
    ("", {WEIGHTS: None, "pytorch_model.bin": b"x" * 99_999}, "is damaged, or not a file of w"),
    ("", {QUERY: torch.zeros(3, 4)}, "self.query.weight has shape .3, 4., and should have .48, 48."),
    ("", {QUERY: torch.full((48, 48), math.inf)}, "self.query.weight is not finite"),
])
def test_bad_input_to_fine_tuning(toy_glue, flags, changes, message):
    """Each mistake ends in one sentence, before anything is fine-tuned."""
    folder = Path("out/small/discriminator")
    for name, content in changes.items():
        if isinstance(content, torch.Tensor):
            tensors = model.read_safetensors(folder / WEIGHTS)
            (folder / WEIGHTS).write_bytes(model.to_safetensors(tensors | {name: content}))
        elif content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    shutil.copytree("glue/CoLA", "part/CoLA")
    with pytest.raises((UserError, ModelError), match=message) as error:
        tune(f"--task cola {flags}")
    assert "\n" not in str(error.value) and not Path("out/glue/results.jsonl").exists()


@pytest.mark.parametrize("files, message", [
    ({"dev.tsv": None}, "own has no dev.tsv, dev.csv or dev.jsonl"),
    ({"dev.csv": "a"}, "there are own/dev.tsv and own/dev.csv; keep one"),
    ({"train.tsv": "text\tlabel\na\tbad\nb\tgood\n"}, "line 2 has no column sentence, or sentence1 and"),
    ({"train.tsv": "sentence\nba\n"}, "own/train.tsv, line 2 has no column label; there are"),
    ({"train.tsv": "sentence\tlabel\nba\tx\tx\n"}, "own/train.tsv, line 2 has 3 fields, and the first"),
    ({"train.tsv": "sentence\tlabel\nba\tx\n"}, "own/train.tsv needs at least two different labels"),
    ({"train.tsv": "label\tlabel\tsentence\n1\t2\tba\n"},
     "own/train.tsv, line 1 names a column twice; there are label, label, sentence"),
    ({"train.tsv": "label\tlabel \tsentence\n1\t2\tba\n"},
     "own/train.tsv, line 1 names a column twice; there are label, label, sentence"),
    ({"train.tsv": "sentence\tlabel \nba\tgood\nsentence\tlabel\n"},
     "own/train.tsv, line 3 repeats the first line"),
    ({"dev.tsv": "sentence\tlabel\nba\tbad\n\nba\tbad\n"},
     "own/dev.tsv, line 3 is empty; delete it"),
    ({"dev.tsv": "sentence\tlabel\nba\tbad\nba\n"},
     "own/dev.tsv, line 3 has 1 fields, and the first line 2"),
    ({"train.tsv": "sentence\tlabel\rba\tbad\rdo\tgood\r"}, "the lines of own/train.tsv end with CR; save"),
    ({"train.tsv": None, "train.csv": "sentence,label\rba,bad\rdo,good\r"},
     "the lines of own/train.csv end with CR; save"),
    ({"train.tsv": ""}, "own/train.tsv has no rows"), ({"train.tsv": "sentence\tlabel\n"}, "tsv has no rows"),
    ({"train.tsv": None, "train.csv": 'label,sentence\n"go""od","ba\ndo"\nbad,"ba\ngood,do\n'},
     "own/train.csv, line 4 is not CSV: a quote opens here and is not closed"),
    ({"dev.tsv": None, "dev.csv": 'sentence,label\n"ba\nba,bad\n"do",good\n'},
     "own/dev.csv, line 2 is not CSV: a quote opens here and is not closed"),
    ({"dev.tsv": "sentence\tlabel\nba\todd\n"},
     "own/dev.tsv, line 2: the label is 'odd' and not one of bad, fair, good"),
    ({"dev.tsv": None, "dev.jsonl": '{"sentence": null, "label": "bad"}'},
     "own/dev.jsonl, line 1: column sentence is None, neither text nor a number"),
    ({"dev.tsv": None, "dev.jsonl": '{"sentence": NaN, "label": "bad"}'},
     "own/dev.jsonl, line 1: column sentence is nan, neither text nor a number"),
    ({"train.tsv": None, "train.jsonl": '{"sentence": "ba", "label": Infinity}'},
     "own/train.jsonl, line 1: column label is inf, neither text nor a number"),
    ({"dev.tsv": None, "dev.jsonl": '{"sentence": "ba", "label": "bad"}\n\n'},
     "own/dev.jsonl, line 2 is empty; delete it"),
    ({"dev.tsv": None, "dev.jsonl": "[1]"}, "own/dev.jsonl, line 1 is damaged: it is not a JSON object"),
    ({"dev.tsv": "sentence\tlabel\n"}, "own/dev.tsv has no rows"),
    ({"dev.tsv": "sentence1\tsentence2\tlabel\nba\tdo\tbad\n"},
     "own/dev.tsv, line 2 has sentence1 and sentence2; it should have sentence"),
    ({"train.tsv": None, "train.jsonl": '{"sentence1": "ba", "sentence2": "do", "label": "good"}\n'
                                        '{"sentence": "ba", "label": "bad"}\n'},
     "own/train.jsonl, line 2 has sentence; it should have sentence1 and sentence2"),
])
def test_bad_input_in_own_tasks(toy_glue, files, message):
    """Each mistake ends in one sentence that names file, line and column."""
    write_task("own")
    for name, content in files.items():
        Path("own", name).write_text(content) if content is not None else Path("own", name).unlink()
    with pytest.raises(UserError, match=re.escape(message)):
        tune("--task own")


def test_words_are_not_numbers(toy_glue):
    """--regression wants numbers."""
    write_task("own")
    with pytest.raises(UserError, match="line 2: the label is 'good' and not a number"):
        tune("--task own --regression")


def test_another_run_in_the_folder_is_left_alone_unless_restarted(corpus):
    """Settings that decide the result cannot change on resume; --restart with bad text deletes nothing."""
    write_files(".", {"b.txt": b"ba do ku", "empty.txt": b""})

    def kept():
        return {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}

    pretrain("--num-train-steps 4")
    before, another = kept(), "out/small holds another run .*"
    for change, message in [
        ("--learning-rate 0.1", another + "learning_rate was 0.002 and is now 0.1"),
        ("--data b.txt", another + "the text differs"), ("--hidden-size 16", another + "hidden_size"),
        ("--restart --data empty.txt", "there is no text to train on in empty.txt"),
    ]:
        with pytest.raises(UserError, match=message):
            pretrain(f"--num-train-steps 4 {change}")
        assert kept() == before
    pretrain("--num-train-steps 4 --seed 1 --restart")
    assert read_log()[0]["settings"]["seed"] == 1 and kept() != before


def test_the_files_of_a_sweep_belong_to_it_alone(toy_glue, monkeypatch):
    """A folder's name meets no file of the sweep; --save replaces no network of other settings."""
    for name in "networks", "predictions", "rte":
        write_task(f"out/glue/{name}")
    tune("--task rte out/glue/networks out/glue/predictions out/glue/rte --save --keep-predictions")
    names = ["rte", "own-networks", "own-predictions", "own-rte"]
    assert [name for name, _ in read_results()] == names
    kept = {name: Path(find_network(name), "config.json").read_bytes() for name in names}
    assert len({*kept.values()}) == 4 and Path("out/glue/predictions/train.tsv").exists()
    tune("--task rte --save --dropout 0.2")
    assert len(list(Path("out/glue/networks").glob("rte-*/config.json"))) == 2

    for method in "__init__", "tokenize_splits":  # classes and examples are of the same reading of train
        write_task("own")
        with monkeypatch.context() as patch:
            watch(patch, finetune.Experiment, method, lambda *_: write_task("own", count=20))
            tune("--task own --max-length 32")
        assert read_results()["own-own", 0]["examples"]["train"] == 48


DAMAGE = {
    "cut": lambda raw: raw[:-9] + b"\n",
    "flipped": lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:],
    "JSON": lambda raw: b"[1]\n",
    "binary": lambda raw: b"\xff\x00\n" + raw,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("victim, message", [
    ("results.jsonl", "results.jsonl, line 1 is damaged"),
    ("predictions/*.npz", "npz is damaged; delete it, and the same command makes it again"),
])
def test_damage_to_what_a_sweep_wrote_is_found_and_mended(toy_glue, victim, message, damage):
    """It is refused by name, and what the sentence advises leads to the same results."""
    tune("--task wnli --submit")
    before = read_results()
    [path] = Path("out/glue").glob(victim)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UserError, match=message):
        tune("--task wnli --submit")
    path.unlink()
    tune("--task wnli --submit")
    assert read_results()["wnli", 0] == before["wnli", 0] and path.exists()


def read_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("victim", [WEIGHTS, "vocab.txt", TOKENIZER])
def test_a_saved_network_is_whole_or_refused_and_made_again(toy_glue, victim):
    """A file of it that was cut, flipped or deleted is never used or called kept."""
    tune("--task wnli --save")
    folder = Path(find_network("wnli"))
    before = read_files(folder)
    for content in before[victim][:-9], flip(before[victim], len(before[victim]) - 99), None:
        (folder / victim).unlink()
        if content:
            (folder / victim).write_bytes(content)
        with pytest.raises(UserError, match=f"{victim} is damaged, or of an earlier version; the"):
            finetune.Predictor(folder)
        tune("--task wnli --save")
        assert read_files(folder) == before


def test_a_damaged_config_of_a_saved_network_is_made_again(toy_glue):
    """It is refused by name where the network is used; --save takes it for none."""
    tune("--task wnli --save")
    path = Path(find_network("wnli"), "config.json")
    before = path.read_bytes()
    for damaged in before[:-9], before.replace(b'"num_sentences": 2', b'"num_sentences": 1'):
        assert damaged != before
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="config.json is damaged"):
            finetune.Predictor(path.parent)
        tune("--task wnli --save")
        assert path.read_bytes() == before


def test_a_saved_network_of_many_labels_is_taken(toy_glue):
    """The digest of its config.json does not depend on the order of the numbers 9 and 10."""
    labels = [f"{number:02}" for number in range(12)]
    rows = "".join(f"{label}\tba do\n" for label in labels)
    write_files("own", {f"{split}.tsv": f"label\tsentence\n{rows}".encode() for split in ("train", "dev")})
    tune("--task own --save")
    assert finetune.Predictor(find_network("own-own")).labels == labels


def test_closed_standard_input_and_a_rank_of_a_scheduler(toy_glue, monkeypatch, capsys):
    """Closed input is a sentence; a process with RANK=1 throws no predictions away."""
    tune("--task wnli --save")
    command = f"--model {find_network('wnli')} --device cpu --predict-file"
    monkeypatch.setattr(sys, "stdin", io.StringIO("sentence1\tsentence2\n"))
    with pytest.raises(UserError, match="standard input is closed or replaced; use --predict-file FILE"):
        finetune.main(f"{command} - --format tsv".split())
    Path("new.tsv").write_text("sentence1\tsentence2\nba\tdo\n")
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    capsys.readouterr()
    assert train.run_command(lambda: finetune.main(f"{command} new.tsv".split())) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_result_is_added_below_a_line_without_an_end(toy_glue):
    """An editor may remove the last line break of results.jsonl."""
    tune("--task wnli --seeds 1")
    path = Path("out/glue/results.jsonl")
    path.write_bytes(path.read_bytes().rstrip())
    tune("--task wnli --seeds 2")
    assert list(read_results()) == [("wnli", 0), ("wnli", 1)]


def test_a_kill_while_a_network_is_saved_mixes_no_two(toy_glue, monkeypatch):
    """config.json is written last: before the first one there is no network, and an old one fits no other."""
    monkeypatch.setattr(finetune, "best_seed", lambda experiment: max(experiment.finished_results()))
    tune("--task wnli --seeds 2 --save --out whole")
    # The first network's tokenizer_config.json is written before its config.json. The second has the same.
    for seeds, count, message in (1, 1, "has no Classifier; --model takes"), (2, 0, "safetensors is damaged"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail_at("config.json", count))
            with pytest.raises(OSError, match="No space left on device"):
                tune(f"--task wnli --seeds {seeds} --save")
        with pytest.raises(UserError, match=message):
            finetune.Predictor(find_network("wnli"))
        tune(f"--task wnli --seeds {seeds} --save")
    assert read_files(find_network("wnli")) == read_files(find_network("wnli", "whole"))


def test_ranks_that_cannot_work_together_say_why(corpus, monkeypatch):
    """A rank that fails ends the job with its own error; other vocabularies and odd numbers are refused."""
    for number in range(2):
        Path(f"vocab{number}.txt").write_text("\n".join([*SMALL_VOCAB, f"more{number}"]))
    for flags, message in [("BROKEN", "ValueError: rank one is broken"),
                           ("--vocab VOCAB", "the ranks differ in vocab: .* --vocab FILE")]:
        status, printed = launch(2, flags).finish()
        assert status == 1 and re.search(message, printed), printed
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    with pytest.raises(UserError, match="batch_size 8 must be a multiple of 3, the number of processes"):
        pretrain()


def test_commands_end_in_one_line_and_a_status(corpus):
    """A user's mistake is one line and status 1, in any locale; an error of ours keeps its traceback."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for script, *flags in ("train.py", "--data", "nowhere"), ("finetune.py", "--model", "né/né/né"):
        command = [sys.executable, str(HERE / script), *flags]
        process = subprocess.run(command, env=environment, capture_output=True)
        assert process.returncode == 1 and process.stdout == b"", process.stderr
        assert process.stderr.count(b"\n") == 1 and process.stderr.startswith(b"there is no ")
    with pytest.raises(ZeroDivisionError):
        train.run_command(lambda: 1 / 0)


@pytest.mark.parametrize("name, value", [
    ("RANK", "1"), ("RANK", "x"), ("LOCAL_RANK", "1"), ("LOCAL_RANK", "x"), ("WORLD_SIZE", "0"),
    ("WORLD_SIZE", "abc")])
def test_variables_that_no_torchrun_sets_are_refused(corpus, monkeypatch, name, value):
    """A number of a process that cannot be, or is none, ends in a sentence."""
    monkeypatch.setenv(name, value)
    for variable, default in ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1):
        monkeypatch.setattr(train, variable, train.read_variable(variable, default))
    with pytest.raises(UserError, match=f"{name} is {value}, .*but this is no process of torchrun"):
        pretrain()


def test_a_file_system_without_locks_is_refused(corpus, monkeypatch):
    """The lock is named, and another folder asked for, before anything is trained."""
    def flock(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="out/small/lock cannot be locked .No locks available.; use --out"):
        pretrain()
    assert not Path("out/small/discriminator").exists()


@pytest.mark.parametrize("prefix, variables, status, message", [
    ("", {"WORLD_SIZE": "2"}, 1, b"WORLD_SIZE is 2, but this is no process of torchrun"),
    ("exec > /dev/full; ", {"PYTHONUNBUFFERED": ""}, 1, b"No space left on device in standard output; fix"),
    ("exec >&- 2>&-; ", {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, 0, b""),
])
def test_odd_surroundings(corpus, prefix, variables, status, message):
    """A variable of torchrun without it, full or closed output: one sentence or none."""
    command = f"{prefix}{sys.executable} {HERE / 'train.py'} {ARGUMENTS} --num-train-steps 20"
    process = subprocess.run(command, shell=True, env=os.environ | variables, capture_output=True)
    assert process.returncode == status, process.stderr
    assert message in process.stderr and process.stderr.count(b"\n") == status
    assert Path("out/small/discriminator").exists() == (status == 0 or "full" in prefix)


def test_an_error_of_the_system_says_where(corpus, capsys):
    """The sentence names the file or, if the system's error has none, the function."""
    def fail():
        raise OSError(12, "Cannot allocate memory")

    def full_disk():
        with data.atomic_write(Path("a/file")):
            raise OSError(28, "No space left on device")

    for broken, message in (fail, "allocate memory in fail; fix"), (full_disk, "device: 'a/file'; fix"):
        assert train.run_command(broken) == 1
        assert message in capsys.readouterr().err
