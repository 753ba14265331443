"""shoot.py PAGE.html PICTURE.png WIDTH HEIGHT light|dark: the page in Chromium (Qt's), as a picture and as facts.

Run by test_screenshots.py with an interpreter that has PyQt6-WebEngine. Prints one JSON object: width (of what is laid
out), window, background, console (what the page said), ran (whether a script of the page did), stops (of the tab key).
"""

import json
import os
import sys
from typing import Any

PAGE, PICTURE, WIDTH, HEIGHT, SCHEME = sys.argv[1:]
os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # root has none
scheme = ["--blink-settings=preferredColorScheme=0"] if SCHEME == "dark" else []
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = " ".join(["--disable-gpu", "--hide-scrollbars", *scheme])

from PyQt6.QtCore import QTimer, QUrl  # noqa: E402  # pyright: ignore[reportMissingImports]
from PyQt6.QtWebEngineCore import QWebEnginePage  # noqa: E402  # pyright: ignore[reportMissingImports]
from PyQt6.QtWebEngineWidgets import QWebEngineView  # noqa: E402  # pyright: ignore[reportMissingImports]
from PyQt6.QtWidgets import QApplication  # noqa: E402  # pyright: ignore[reportMissingImports]

SETTLE_MS, LIMIT_MS = 1500, 60_000
FACTS = """JSON.stringify({
  width: document.documentElement.scrollWidth, window: window.innerWidth, ran: window.ran === true,
  background: getComputedStyle(document.body).backgroundColor,
  stops: document.querySelectorAll("a[href], summary, [tabindex]").length
})"""
console: list[str] = []


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level: Any, message: Any, line: Any, source: Any) -> None:  # noqa: N802 - Qt's
        console.append(str(message))


app = QApplication(sys.argv[:1])
view = QWebEngineView()
page = Page(view)
view.setPage(page)
view.resize(int(WIDTH), int(HEIGHT))
view.show()


def finish(facts: str) -> None:
    saved = view.grab().save(PICTURE)
    print(json.dumps({**json.loads(facts), "console": console, "saved": saved}))
    app.quit()


page.loadFinished.connect(lambda _: QTimer.singleShot(SETTLE_MS, lambda: page.runJavaScript(FACTS, finish)))
page.load(QUrl.fromLocalFile(os.path.abspath(PAGE)))
QTimer.singleShot(LIMIT_MS, app.quit)
app.exec()
