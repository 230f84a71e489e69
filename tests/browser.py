"""Uses the page of scripts/demo as a person would; run by .venv-demo's Python, see test_demo.py.

    python browser.py URL CHROMIUM SCREENSHOT      prints what it saw, as JSON
"""

import json
import sys

from playwright.sync_api import Page, sync_playwright

CAPTION = "#pictures .caption-label"
PATIENCE = 120_000  # ms


def captions(page: Page, unlike: list[str]) -> list[str]:
    """What stands below the pictures, once it differs."""
    page.wait_for_function(
        """([selector, unlike]) => {
            const found = [...document.querySelectorAll(selector)].map(e => e.innerText);
            return found.length && JSON.stringify(found) != JSON.stringify(unlike);
        }""", arg=[CAPTION, unlike], timeout=PATIENCE)
    return page.locator(CAPTION).all_inner_texts()


def sizes(page: Page) -> list[list[int]]:
    """The pixels of the pictures, once all are there."""
    page.wait_for_function(
        "[...document.querySelectorAll('#pictures img')].every(e => e.complete)")
    return page.evaluate("[...document.querySelectorAll('#pictures img')]"
                         ".map(e => [e.naturalWidth, e.naturalHeight])")


def use(page: Page, url: str, screenshot: str) -> dict:
    seen, hosts = {}, set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2])
            if request.url.startswith("http") else None)
    page.goto(url)
    page.click("#make")  # without a text
    toast = page.locator(".toast-body").first
    toast.wait_for(timeout=PATIENCE)
    seen["error"] = toast.inner_text()

    page.fill("#text textarea", "a zeppelin on the beach at night")
    page.click("#make")
    page.locator("#note", has_text="zeppelin").wait_for(timeout=PATIENCE)
    seen["first"] = captions(page, [])
    page.get_by_text("a cat and a dog on the beach by day").click()  # an example fills the box
    page.wait_for_function("document.querySelector('#text textarea').value.includes('dog')")
    page.press("#text textarea", "Enter")
    seen["second"] = captions(page, seen["first"])
    seen["sizes"] = sizes(page)
    page.wait_for_function("!document.querySelector('#note').innerText.includes('zeppelin')")
    page.wait_for_function("!document.querySelector('.toast-body')", timeout=PATIENCE)
    page.screenshot(path=screenshot)
    page.click("#vary")
    seen["third"] = captions(page, seen["second"])
    seen["hosts"] = sorted(hosts)
    return seen


def main() -> None:
    url, chromium, screenshot = sys.argv[1:]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 860})
        print(json.dumps(use(page, url, screenshot)))
        browser.close()


if __name__ == "__main__":
    main()
