"""The pictures of the pages in docs/images, made anew: a server of the default model, calls that meet in its steps, and a Chromium.

Owns what is asked and what is cropped. What is drawn is real: the texts, the times and the waits are those of this machine and of
this minute, so each making differs.
"""

import json
import os
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, FloatRect, Page, sync_playwright
from serving import Client, serving

MODEL = "qwen2.5-coder-0.5b"
CHROMIUM = "/usr/bin/chromium"
FOLDER = Path(__file__).parents[1] / "docs" / "images"
WIDTH = 1200
MAX_BYTES = 150_000
PNG = b"\x89PNG\r\n\x1a\n"

BAKERY = "You answer for a small bakery in Seoul. Be brief and kind, and never guess a price."
NOTES = "Say in one sentence what these notes are about.\n" + "\n".join(
    f"Room {room}: the oven was cleaned at {room % 24}:00, its door stood open for {room * 7 % 50} minutes."
    for room in range(8)
)


def ask(client: Client, question: str, *, system: str | None = None, **fields: object) -> str:
    """The run's id."""
    messages = [{"role": "system", "content": system}] if system else []
    body = {"messages": [*messages, {"role": "user", "content": question}], "temperature": 0, **fields}
    answer_id = json.loads(client.call("/v1/chat/completions", json.dumps(body).encode()))["id"]
    assert isinstance(answer_id, str)
    return answer_id


class Crowd:
    """Calls that run beside each other; their ids in the order of their beginning."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._threads: list[threading.Thread] = []
        self.ids: dict[str, str] = {}

    def begin(self, name: str, question: str, system: str | None = None, **fields: object) -> None:
        def work() -> None:
            self.ids[name] = ask(self._client, question, system=system, **fields)

        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()
        time.sleep(0.05)  # they come one after the other, as people do

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()


def open_page(browser: Browser, url: str, height: int) -> Page:
    context = browser.new_context(locale="en-US", color_scheme="light", viewport={"width": WIDTH, "height": height})
    page = context.new_page()
    page.goto(url)
    return page


def keep(page: Page, name: str, height: int) -> None:
    clip: FloatRect = {"x": 0, "y": 0, "width": WIDTH, "height": height}
    data = with_palette(page.screenshot(clip=clip))
    path = FOLDER / f"{name}.png"
    path.write_bytes(data)
    print(f"{path}: {len(data) / 1000:.0f} kB")
    assert len(data) <= MAX_BYTES, f"{path} is larger than {MAX_BYTES} bytes; crop it closer"


def with_palette(png: bytes) -> bytes:
    """The same picture in the 256 colours that stand for it best, a third of the bytes. A picture of a page has few colours."""
    pixels = decode(png)
    coarse = (pixels >> 2).astype(np.int32)
    codes = (coarse[..., 0] << 12) | (coarse[..., 1] << 6) | coarse[..., 2]
    _, first, place, counts = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
    colours = pixels.reshape(-1, 3)[first].astype(np.int32)
    kept = np.argsort(-counts)[:256]
    nearest = np.array([np.argmin(((colours[kept] - colour) ** 2).sum(axis=1)) for colour in colours], dtype=np.uint8)
    height, width = codes.shape
    rows = np.zeros((height, width + 1), dtype=np.uint8)  # a filter byte before each row: none
    rows[:, 1:] = nearest[place].reshape(height, width)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    palette = colours[kept].astype(np.uint8).tobytes()
    parts = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return PNG + b"".join(chunks)


def decode(png: bytes) -> np.ndarray:
    """Rows of pixels of three bytes, out of the PNG that Chromium writes: 8 bits a channel, no interlace."""
    width, height, bits, kind = struct.unpack_from(">IIBB", png, 16)
    size = {2: 3, 6: 4}[kind]
    assert bits == 8
    data, at = b"", len(PNG)
    while at < len(png):
        length = struct.unpack_from(">I", png, at)[0]
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    lines = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(height, width * size + 1)
    out = np.zeros((height + 1, width * size + size), dtype=np.uint8)  # a row above and a pixel to the left, of zeros
    for y, (how, line) in enumerate(zip(lines[:, 0], lines[:, 1:], strict=True), 1):
        unfilter(int(how), line.tolist(), out[y - 1].tolist(), out[y], size)
    return out[1:, size:].reshape(height, width, size)[..., :3]


def unfilter(how: int, line: list[int], above: list[int], row: np.ndarray, size: int) -> None:
    now = [0] * size
    for x, value in enumerate(line):
        left, up, corner = now[x], above[x + size], above[x]
        if how == 1:
            value += left
        elif how == 2:
            value += up
        elif how == 3:
            value += (left + up) // 2
        elif how == 4:
            guess = left + up - corner
            value += min((left, up, corner), key=lambda each: abs(guess - each))
        now.append(value & 255)
    row[:] = now


def take_run(browser: Browser, client: Client) -> None:
    ask(client, "When do you open on Sundays?", system=BAKERY, max_tokens=24)  # its beginning is in the cache now
    crowd = Crowd(client)
    crowd.begin("first", "Explain what a KV cache is.", max_tokens=48)
    crowd.begin("notes", NOTES, max_tokens=16)
    crowd.begin(
        "shown", "Do you bake bread without gluten?", system=BAKERY, max_tokens=14, logprobs=True, top_logprobs=5
    )
    crowd.wait()
    page = open_page(browser, f"{client.url}/runs/{crowd.ids['shown']}", 2100)
    page.wait_for_selector("#station-machine tbody tr")
    page.locator("#station-decode [role=option]").nth(3).click()
    page.mouse.move(0, 0)
    bottom = page.locator("#station-decode").evaluate("(e) => e.getBoundingClientRect().bottom + scrollY")
    keep(page, "run", int(bottom))


def take_engine(browser: Browser, client: Client) -> None:
    page = open_page(browser, f"{client.url}/engine", 1280)
    page.wait_for_selector(".timeline-canvas")
    page.locator(".segments label").nth(1).click()  # 20 s
    for round_ in range(3):  # a picture with a past; the last round is the present
        crowd = Crowd(client)
        for place in range(4):
            crowd.begin(
                f"story {place}", f"Tell a long story of {round_ + place + 2} foxes.", max_tokens=100, ignore_eos=True
            )
        crowd.begin("notes", f"{round_}. {NOTES}", max_tokens=24)
        if round_ < 2:
            crowd.wait()
    page.wait_for_function("() => document.querySelectorAll('#streams .stream').length > 2")
    page.mouse.move(0, 0)
    keep(page, "engine", 1280)
    crowd.wait()


def take_chat(browser: Browser, client: Client) -> None:
    page = open_page(browser, client.url, 720)
    for count, question in enumerate(
        ("What is the capital of South Korea?", "Write it in Korean, and say nothing else."), 1
    ):
        page.locator("#composer-text").fill(question)
        page.keyboard.press("Enter")
        page.wait_for_function("(count) => document.querySelectorAll('.figures').length === count", arg=count)
    page.locator(".answer").last.get_by_role("button", name="Tokens").click()
    page.wait_for_selector(".answer .tokens .token")
    page.mouse.move(0, 0)
    keep(page, "chat", 720)


def main() -> None:
    command = [str(Path(sys.executable).with_name("jilju")), "serve", MODEL, "--port", "0", "--kv-memory", "128MiB"]
    FOLDER.mkdir(exist_ok=True)
    with serving(command, dict(os.environ)) as server, sync_playwright() as playwright:
        client = server.wait_ready()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for take in (take_run, take_engine, take_chat):
            take(browser, client)
        browser.close()


main()
