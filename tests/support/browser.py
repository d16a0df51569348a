"""A real browser, where there is one: Chromium or Chrome, and its driver."""

import contextlib
import os
import shutil

import pytest


@contextlib.contextmanager
def browser(language, tmp_path):
    """Yields a headless browser of a user with this language.

    Without a browser it skips the test, and fails it if GPT2_FLAX_BROWSER_TESTS is in the environment.
    """
    webdriver = pytest.importorskip("selenium.webdriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (program and driver):
        assert "GPT2_FLAX_BROWSER_TESTS" not in os.environ, "no browser, or no chromedriver"
        pytest.skip("no browser, or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for switch in f"{switches} disable-component-update disable-sync user-data-dir={tmp_path} lang={language}".split():
        options.add_argument(f"--{switch}")
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()
