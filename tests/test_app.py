"""The page, by HTTP and in a real browser: images are generated and edited, bad input is said, nothing stays behind."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from dreamlite_jax import app, model_folder, pictures
from dreamlite_jax.errors import UserError

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1400,1400",
)  # fmt: skip
PATIENCE_S = 300


class Recording:
    """Keeps what a run is asked, and answers with noise; the page's own logic is what is tested with it."""

    def __init__(self, model):
        self.config, self._model, self.asked = model.config, model, []

    def run(self, prompts, **options):
        self.asked.append((prompts, options))
        return self._model.run(prompts, **options)

    def decode_latents(self, latents):
        return self._model.decode_latents(latents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose edits have the size of their source, as the released ones."""
    config = dataclasses.replace(tiny.CONFIG, edit_size="source")
    params = {"unet": tiny.unet_params(), "vae": tiny.vae_params()}
    return model_folder.save_model(tmp_path_factory.mktemp("app") / "model", config, params, {"made": "at random"})


@pytest.fixture(scope="module")
def model(folder):
    import dreamlite_jax

    loaded = dreamlite_jax.load_model(folder)
    loaded.encoder = tiny.WordEncoder()
    return loaded


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return path


# --------------------------------------------------------------------------------------- what the buttons do


def test_pictures_have_their_seeds_and_settings(model, tmp_path):
    recording = Recording(model)
    studio = app.Studio(recording, "tiny", tmp_path)
    made, shown = studio.run("a cat", None, 16.0, 24.0, 2.0, 2.5, 1.5, 7.0, 2.0, editing=False)
    assert [caption for _, caption in made] == ["seed 7", "seed 8"]
    assert [caption for _, caption in shown] == ["step 1", "step 2"]
    [(prompts, options)] = recording.asked
    assert prompts == ["a cat", "a cat"] and options["seeds"] == [7, 8] and options["images"] is None
    with Image.open(made[1][0]) as image:
        assert image.size == (16, 24)
        settings = json.loads(image.text["dreamlite_jax"])
    assert settings == {
        "task": "generate", "prompt": "a cat", "image": None, "image_sha256": None,
        "steps": 2, "guidance_scale": 2.5, "image_guidance_scale": 1.5, "width": 16, "height": 24,
        "model": "tiny", "seed": 8,
    }  # fmt: skip
    last = np.asarray(Image.open(shown[-1][0])).astype(int)
    assert np.abs(last - np.asarray(Image.open(made[0][0]))).max() <= 1  # the last prediction is the first picture
    again, _ = studio.run("a cat", None, 16.0, 24.0, 2.0, 2.5, 1.5, 7.0, 1.0, editing=False)
    assert again[0][0] != made[0][0] and Path(made[0][0]).is_file()  # earlier pictures stay


@pytest.mark.filterwarnings("ignore::dreamlite_jax.text.words.UnreadWords")
def test_words_that_cannot_be_read_are_said(model, tmp_path):
    notes, studio = [], app.Studio(model, "tiny", tmp_path)
    made, _ = studio.run("a 🦋 or 蝶", None, 16, 16, 1, 2.0, 1.5, 0, 1, editing=False, say=notes.append)
    assert len(made) == 1 and len(notes) == 1 and notes[0].startswith("the text encoder does not know '🦋', '蝶', so")


def test_an_edit_takes_the_picture(model, tmp_path, source):
    recording = Recording(model)
    made, _ = app.Studio(recording, "tiny", tmp_path).run(
        "make it red", str(source), 16.0, 16.0, 1.0, 2.0, 1.5, 0.0, 1.0, editing=True
    )
    assert len(made) == 1
    settings = json.loads(Image.open(made[0][0]).text["dreamlite_jax"])
    assert (settings["task"], settings["image"]) == ("edit", "source.png") and len(settings["image_sha256"]) == 64
    [image] = recording.asked[0][1]["images"]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(source)))


@pytest.mark.parametrize(
    ("size", "expected"), [((30, 22), (28, 20)), ((300, 200), (32, 20)), ((900, 10), (32, 4)), ((32, 32), (32, 32))]
)
def test_the_page_offers_the_size_of_the_source(model, tmp_path, size, expected):
    """As far as the network (multiples of 4) and the page (twice the native 16) go."""
    Image.new("RGB", size).save(tmp_path / "source.png")
    assert app.source_size(model.config, str(tmp_path / "source.png")) == expected


def test_bad_input_is_refused(model, tmp_path):
    studio = app.Studio(model, "tiny", tmp_path)
    with pytest.raises(UserError, match="no picture to edit"):
        studio.run("make it red", None, 16, 16, 1, 2.0, 1.5, 0, 1, editing=True)
    with pytest.raises(UserError, match="seed is None"):
        studio.run("a cat", None, 16, 16, 1, 2.0, 1.5, None, 1, editing=False)
    with pytest.raises(UserError, match="prompt is empty"):
        studio.run("", None, 16, 16, 1, 2.0, 1.5, 0, 1, editing=False)
    for prompt, says in (("🦋", "knows none of the prompt's words: '🦋'"), ("\u200b", "nothing can be seen")):
        with pytest.raises(UserError, match=says):
            studio.run(prompt, None, 16, 16, 1, 2.0, 1.5, 0, 1, editing=False)
    with pytest.raises(UserError, match="--port is 0"):
        app.main(["--model", "model", "--port", "0"])


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dreamlite_jax\[app\]'"):
        app.main(["--model", "model"])


# ---------------------------------------------------------------------------------------------------- the server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """The page, served by the command itself, whose temporary files go to `temporary`."""

    def __init__(self, folder: Path, root: Path):
        self.temporary, self.log, port = root / "tmp", root / "app.log", free_port()
        self.temporary.mkdir()
        command = [sys.executable, "-m", "dreamlite_jax.app", "--model", str(folder), "--port", str(port)]
        environment = {**os.environ, "XLA_FLAGS": "", "no_proxy": "127.0.0.1,localhost", "TMPDIR": str(self.temporary)}
        environment.pop("GRADIO_TEMP_DIR", None)
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        self.address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    raise AssertionError(self.log.read_text()) from None
                time.sleep(0.3)

    def files(self) -> list[str]:
        """Pictures and uploads that lie in the temporary folder."""
        return [str(path) for path in self.temporary.rglob("*") if path.is_file()]

    def end(self, number: signal.Signals) -> None:
        """Ends the command by a signal; nothing may be left."""
        self.process.send_signal(number)
        self.process.wait(60)
        assert not list(self.temporary.iterdir())
        assert "Traceback" not in self.log.read_text()


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed; it is the extra [app]")
    served = Server(folder, tmp_path_factory.mktemp("server"))
    try:
        yield served
        assert served.files()  # else there is nothing to remove
        served.end(signal.SIGTERM)
    finally:
        served.process.kill()


@pytest.fixture(scope="module")
def address(server):
    return server.address


# ------------------------------------------------------------------------------------------------------ by HTTP


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False)


def edit(client, path):
    """Paths of the pictures that the page makes of an upload."""
    from gradio_client import handle_file

    values = {"prompt": "make it blue", "width": 16, "height": 16, "steps": 1, "seed": 3, "count": 1}
    scales = {"guidance": 2.0, "image_guidance": 1.5}
    made, _ = client.predict(**values, **scales, source=handle_file(path), api_name="/edit")
    return [picture["image"] for picture in made]


def test_an_edit_names_its_source(client, source):
    [path] = edit(client, source)
    settings = json.loads(Image.open(path).text["dreamlite_jax"])
    assert (settings["task"], settings["image"], settings["seed"]) == ("edit", "source.png", 3)
    assert settings["image_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def unreadable(path, kind):
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "HEIC":
        path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    elif kind == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif kind == "floats":
        Image.fromarray(np.tile(np.float32([0, 300]), (16, 8))).save(path, "TIFF")
    elif kind == "huge":
        Image.new("1", (20000, 10000)).save(path)
    else:
        Image.new("RGB", (3, 40)).save(path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("text", "cannot be read as a picture (it is of no kind that is known); PNG, JPEG and WebP work"),
        ("HEIC", "cannot be read as a picture (it is HEIC); PNG, JPEG and WebP work"),
        ("cut", "cannot be read as a picture (image file is truncated"),
        ("floats", "has floating-point values from 0 to 300 (mode F)"),
        ("huge", "has more than 178956970 pixels; scale it down"),
        ("tiny", "is 3x40 pixels; each side must be at least 8"),
    ],
)
def test_an_unreadable_upload_is_said_as_on_the_command_line(client, server, tmp_path, kind, says):
    """By its name, without folders of the server."""
    from gradio_client.exceptions import AppError

    unreadable(tmp_path / "upload.png", kind)
    with pytest.raises(AppError) as refused:
        edit(client, tmp_path / "upload.png")
    with pytest.raises(UserError) as by_command:
        pictures.read_picture(tmp_path / "upload.png")
    said = str(refused.value)
    assert said.startswith(f"image upload.png {says}")
    assert said == str(by_command.value).replace(f"{tmp_path}/", "")
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_however_the_page_ends(folder, source, tmp_path, number):
    from gradio_client import Client

    served = Server(folder, tmp_path)
    try:
        edit(Client(served.address, verbose=False, analytics_enabled=False), source)
        assert any("source.png" in path for path in served.files())
        assert not [path for path in served.files() if "dreamlite_" not in path]  # all in the one folder
        served.end(number)
    finally:
        served.process.kill()


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; it drives the browser")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no chromium or no chromedriver; Debian's packages chromium and chromium-driver have them")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Page:
    """What a person does on the page, and sees."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.find("#generate_button"))

    def find(self, css: str):
        return self.browser.find_elements("css selector", css)

    def wait(self, condition):
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, self.browser.find_element("tag name", "body").text
            time.sleep(0.2)
        return found

    def write(self, name: str, text: str) -> None:
        [box] = self.find(f"#{name} textarea, #{name} input[type=number]")
        box.clear()
        box.send_keys(text)

    def number(self, name: str) -> str:
        """What the box of a slider shows."""
        return self.find(f"#{name} input[type=number]")[0].get_property("value")

    def press(self, name: str) -> None:
        self.find(f"#{name}")[0].click()

    def open_tab(self, label: str) -> None:
        [tab] = [x for x in self.find("button[role=tab]") if x.text == label]
        tab.click()

    def pictures(self, name: str) -> list[str]:
        """Addresses of the pictures in a gallery that have been loaded and have pixels."""
        shown = self.find(f"#{name} img")
        return [x.get_attribute("src") for x in shown if int(x.get_property("naturalWidth") or 0) > 0]

    def photograph(self, name: str) -> None:
        """For a person to look at, where the environment names a folder."""
        if folder := os.environ.get("DREAMLITE_SCREENSHOTS"):
            self.browser.save_screenshot(f"{folder}/{name}.png")

    def messages(self) -> str:
        return " ".join(x.text for x in self.find(".toast-body, .toast-wrap, [data-testid=toast-body]"))


def fetch(url: str, path: Path) -> Image.Image:
    with urllib.request.urlopen(url, timeout=30) as answer:
        path.write_bytes(answer.read())
    image = Image.open(path)
    image.load()
    return image


def test_generate_and_edit_through_the_page(browser, address, source, tmp_path):
    page = Page(browser, address)
    page.write("generate_prompt", "a red heart")
    page.write("generate_seed", "5")
    page.press("generate_button")
    [url] = page.wait(lambda: page.pictures("generate_gallery"))
    image = fetch(url, tmp_path / "made.png")
    settings = json.loads(image.text["dreamlite_jax"])
    assert image.size == (16, 16) and np.asarray(image).std() > 0
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a red heart", 5, tiny.CONFIG.steps)

    page.photograph("generate")

    page.open_tab("Edit")
    [upload] = page.find("#edit_source input[type=file]")
    upload.send_keys(str(source))
    page.wait(lambda: page.pictures("edit_source"))
    page.wait(lambda: page.number("edit_width") == "28")  # 30 x 20 rounded down to what the network takes
    page.write("edit_prompt", "make it blue")
    page.press("edit_button")
    [url] = page.wait(lambda: page.pictures("edit_gallery"))
    edited = fetch(url, tmp_path / "edited.png")
    assert json.loads(edited.text["dreamlite_jax"])["prompt"] == "make it blue"
    assert edited.size == (28, 20) and np.asarray(edited).std() > 0
    page.photograph("edit")


def test_bad_input_is_said_on_the_page(browser, address):
    page = Page(browser, address)
    page.press("generate_button")
    page.wait(lambda: "prompt is empty; task generate needs words" in page.messages())
    page.open_tab("Edit")
    page.write("edit_prompt", "make it blue")
    page.press("edit_button")
    page.wait(lambda: "there is no picture to edit; choose one first" in page.messages())
    assert not re.search("Traceback", browser.page_source)
