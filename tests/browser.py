"""A page as headless Chromium shows it: what its console says, where its pictures stand, and what is drawn there."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name))), None)
MISSING = "no Chromium on this machine: apt-get install chromium"
WIDTH = 1240

# The page itself must do without scripts: only a copy of it is measured.
_BOXES = """<body><pre id="said"></pre>PAGE<script>
const boxes = [...document.querySelectorAll("svg.chart")].map(one => {
  const box = one.getBoundingClientRect();
  return [one.getAttribute("aria-label"), ...[box.x, box.y, box.width, box.height].map(Math.round)]});
const root = document.documentElement;
document.getElementById("said").textContent = JSON.stringify([boxes, root.scrollWidth, root.scrollHeight]);
</script>"""
# The browser reads its own screenshot back: the most frequent colour of a box is its background.
_PIXELS = """<pre id="said"></pre><img src="data:image/png;base64,IMAGE"><script>
onload = () => {
  const image = document.images[0], canvas = document.createElement("canvas");
  canvas.width = image.width; canvas.height = image.height;
  const pen = canvas.getContext("2d", {willReadFrequently: true}); pen.drawImage(image, 0, 0);
  const found = BOXES.map(([label, x, y, width, height]) => {
    const data = pen.getImageData(x, y, width, height).data, seen = new Map();
    for (let i = 0; i < data.length; i += 4) {
      const colour = (data[i] << 16) + (data[i + 1] << 8) + data[i + 2];
      seen.set(colour, (seen.get(colour) || 0) + 1)}
    return [label, y + height <= image.height, 1 - Math.max(...seen.values()) / (width * height), seen.size]});
  const corner = pen.getImageData(2, 2, 1, 1).data;
  document.getElementById("said").textContent = JSON.stringify([found, (corner[0] + corner[1] + corner[2]) / 3])}
</script>"""


@dataclass(frozen=True)
class Picture:
    """A chart in the screenshot: its alternative text, whether all of it is there, and what is drawn.

    `drawn` is the share of its pixels that are not background, `colours` the number of different ones.
    """

    label: str
    whole: bool
    drawn: float
    colours: int


@dataclass(frozen=True)
class Seen:
    """What the browser showed: lines on its console, the background's brightness (0 to 255), the page's pictures.

    `overflow` is by how many pixels the page is wider than the window.
    """

    console: list[str]
    brightness: float
    overflow: int
    pictures: list[Picture]


def look(page: Path, dark: bool = False) -> Seen:
    """Open `page` and take a screenshot of all of it."""
    with tempfile.TemporaryDirectory() as scratch:
        script, shot = Path(scratch, "script.html"), Path(scratch, "page.png")
        # Before the text it takes no room: everything stands where it stands in the page.
        head, _, body = page.read_text(encoding="utf-8").partition("<body>")
        hidden = _BOXES.replace("<pre ", "<pre hidden ").replace("PAGE", body)
        script.write_text(head + hidden, encoding="utf-8")
        boxes, width, height = _said(_chromium(scratch, script, 1000, dark, "--dump-dom").stdout)
        log = _chromium(scratch, page, height, dark, f"--screenshot={shot}").stderr
        image = base64.b64encode(shot.read_bytes()).decode()
        script.write_text(_PIXELS.replace("IMAGE", image).replace("BOXES", json.dumps(boxes)), encoding="utf-8")
        found, brightness = _said(_chromium(scratch, script, 1000, dark, "--dump-dom").stdout)
    console = [line for line in log.splitlines() if "CONSOLE" in line]
    return Seen(console, brightness, width - WIDTH, [Picture(*one) for one in found])


def _said(dom: str) -> list:  # type: ignore[type-arg]
    found: list = json.loads(unescape(re.findall(r'<pre [^>]*id="said">(.*?)</pre>', dom, re.DOTALL)[0]))  # type: ignore[type-arg]
    return found


def _chromium(scratch: str, page: Path, height: int, dark: bool, *more: str) -> subprocess.CompletedProcess[str]:
    scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
    words = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        scheme,
    ]
    words += [f"--user-data-dir={scratch}/profile", f"--window-size={WIDTH},{height}", "--force-device-scale-factor=1"]
    words += ["--enable-logging=stderr", "--disable-dev-shm-usage", *more, page.resolve().as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
