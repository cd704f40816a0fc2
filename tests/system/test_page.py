"""The web page in a real browser, against the real server."""

import json
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.server import EXAMPLE, FIRST_ANSWER, FIRST_QUESTION, Server
from tests.support.waiting import PATIENCE_S

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser: apt-get update && apt-get install -y chromium chromium-driver"
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1300,1200",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, server: Server) -> webdriver.Chrome:
    """The page, opened anew."""
    browser.get("about:blank")  # else only its fragment might change
    browser.get(server.url)
    return browser


def wait(page: webdriver.Chrome, condition):
    return WebDriverWait(page, PATIENCE_S).until(condition)


def choose(page: webdriver.Chrome, name: str) -> None:
    """Chooses a memory by its title, when it is ready."""
    path = f"//ul[@id='memories']//button[.//b[text()={json.dumps(name)}]][.//small[@class='ready']]"

    def chosen(p: webdriver.Chrome) -> bool:
        """Clicks it; the list may be drawn anew between finding and clicking."""
        try:
            return any(button.click() is None for button in p.find_elements(By.XPATH, path)[:1])
        except StaleElementReferenceException:
            return False

    wait(page, chosen)
    wait(page, lambda p: p.find_element(By.ID, "go").is_enabled())


def ask(page: webdriver.Chrome, question: str) -> None:
    page.find_element(By.ID, "question").send_keys(question)
    page.find_element(By.ID, "go").click()
    wait(page, lambda p: p.find_element(By.ID, "timings").text or p.find_element(By.ID, "problem").is_displayed())
    assert not page.find_element(By.ID, "problem").is_displayed(), page.find_element(By.ID, "problem").text


def test_a_question_is_answered_with_its_grounds(page: webdriver.Chrome, server: Server, chronicle: dict) -> None:
    page.refresh()
    choose(page, chronicle["title"])
    ask(page, FIRST_QUESTION)
    assert FIRST_ANSWER in page.find_element(By.ID, "answer").text
    assert page.find_elements(By.CSS_SELECTOR, "#passages li")
    marks = [mark.get_property("textContent") for mark in page.find_elements(By.CSS_SELECTOR, "#passages mark")]
    assert marks and all(mark in EXAMPLE["text"] for mark in marks)
    stages = [bar.text.split()[0] for bar in page.find_elements(By.CSS_SELECTOR, "#timings .bar")]
    assert stages == ["recall", "retrieve", "generate", "total"]
    assert "its words are noise" in page.find_element(By.ID, "notes").text


def test_a_pasted_text_is_memorized_and_never_becomes_markup(page: webdriver.Chrome, server: Server) -> None:
    hostile = "<img src=x onerror=\"document.title='taken over'\">"
    page.find_element(By.ID, "title").send_keys(f"Notes {hostile}")
    text = page.find_element(By.ID, "text")
    page.execute_script(
        "arguments[0].value = arguments[1]", text, f"The gate 𝒳 opened at noon. {hostile} It closed. " * 20
    )
    page.find_element(By.ID, "memorize").click()
    # Not `.text`, which is what the style sheet makes of it: capitals.
    title = "return document.getElementById('chosen').textContent"
    wait(page, lambda p: "Notes" in p.execute_script(title) and p.find_element(By.ID, "go").is_enabled())
    ask(page, f"When did the gate open? {hostile}")
    assert hostile in page.find_element(By.ID, "passages").get_property("textContent")
    assert page.title == "MemoRAG" and not page.find_elements(By.CSS_SELECTOR, "main img")


def test_documents_are_added_and_deleted(page: webdriver.Chrome, server: Server) -> None:
    page.find_element(By.ID, "title").send_keys("Ledger")
    page.find_element(By.ID, "text").send_keys("The miller owed nine sacks of barley. " * 10)
    page.find_element(By.ID, "memorize").click()
    choose(page, "Ledger")
    page.find_element(By.XPATH, "//select[@id='into']/option[text()='Ledger']").click()
    page.find_element(By.ID, "title").send_keys("late entries")
    page.find_element(By.ID, "text").send_keys("The baker paid for seven copper kettles. " * 10)
    page.find_element(By.ID, "memorize").click()
    names = "return [...document.querySelectorAll('#memories .documents span')].map(each => each.textContent)"
    wait(page, lambda p: p.execute_script(names) == ["doc-1", "late-entries"])
    wait(page, lambda p: p.find_element(By.ID, "go").is_enabled())
    ask(page, "Who paid for copper kettles?")
    assert "copper kettles" in page.find_element(By.ID, "passages").get_property("textContent")
    page.find_element(By.CSS_SELECTOR, "[aria-label='Delete the document late-entries']").click()
    page.switch_to.alert.accept()
    wait(page, lambda p: p.execute_script(names) == ["doc-1"])
    page.find_element(By.ID, "question").clear()
    ask(page, "Who paid for copper kettles?")
    assert "copper kettles" not in page.find_element(By.ID, "passages").get_property("textContent")


def test_a_refused_text_shows_why(page: webdriver.Chrome) -> None:
    page.find_element(By.ID, "text").send_keys("   ")
    page.find_element(By.ID, "memorize").click()
    wait(page, lambda p: p.find_element(By.ID, "problem").is_displayed())
    assert page.find_element(By.ID, "problem-detail").text
    assert page.find_element(By.ID, "text").get_property("value") == "   ", "what was typed was lost"


def test_nothing_is_fetched_from_elsewhere(page: webdriver.Chrome, server: Server) -> None:
    wait(page, lambda p: p.find_elements(By.CSS_SELECTOR, "#memories li, #empty:not([hidden])"))
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith((server.url, "data:", "chrome:")) for url in urls), urls
    refused = [entry["message"] for entry in page.get_log("browser") if "Content Security Policy" in entry["message"]]
    assert not refused
