"""The chat page in a real browser, against a real service."""

import json
import urllib.error
import urllib.request

import pytest
import torch

pytest.importorskip("websocket", reason="websocket-client is not installed (requirements-dev.txt)")
from browser import CHROMIUM, Browser
from served import CONTEXT, running

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import save_checkpoint
from gpt_model import GPTConfig, GPTModel
from inference.service.static_page import FOLDER

QUESTION = "Attack!"
ANSWER = """**Bold**, <script>document.title='owned'</script><img src=x onerror=alert(1)> [x](javascript:alert(2))

```html
<b>code</b>
```

- one
- two

"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A model that has learned one dangerous answer by heart, and at temperature 0 never ends."""
    torch.manual_seed(0)
    tokenizer = ByteLevelBPETokenizer(300)
    tokenizer.train([ANSWER] * 2)
    sizes = dict(d_model=64, n_layers=2, n_heads=2, max_seq_len=CONTEXT)
    config = GPTConfig.for_architecture("modern", vocab_size=tokenizer.vocab_size, **sizes)
    model = GPTModel.from_config(config)
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}], add_generation_prompt=True)["input_ids"]
    answer = tokenizer.encode(ANSWER * 2, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(ids, labels=ids)["loss"]
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = model.state_dict()
    for name in ("token_embedding.weight", "lm_head.weight"):
        state[name][tokenizer.eos_token_id] = 0
    path = tmp_path_factory.mktemp("page") / "sft_best.pth"
    return save_checkpoint(path, model_state=state, config=config, tokenizer=tokenizer, stage="sft")


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    with running(tmp_path_factory.mktemp("log") / "log", "--model_path", str(model_path)) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian's package `chromium`)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, server):
    """The page with nothing kept, in English, greedy and with short answers."""
    browser.open(f"{server.url}/icon.svg")  # the same origin, without the page, which keeps what it has when it is left
    settings = {"language": "en", "temperature": 0, "max_tokens": 60}
    browser.evaluate(f"localStorage.clear(); localStorage.setItem('chat.settings', '{json.dumps(settings)}')")
    browser.open(f"{server.url}/")
    browser.wait_for("document.getElementById('model').textContent === 'sft_best'")
    browser.complaints.clear()
    yield browser
    assert browser.complaints == []
    assert browser.hosts - {"", server.url.removeprefix("http://")} == set(), "the page asks other hosts"


DONE = "document.querySelector('article.assistant:last-child:not(.busy) .actions button')"


def ask(page, text=QUESTION):
    page.evaluate("document.getElementById('input').focus()")
    page.type(text)
    page.press("Enter")


def choose(page, name, value):
    """Change a setting."""
    field = f"document.querySelector('[name={name}]')"
    page.evaluate(f"{field}.value = {json.dumps(value)}")
    for event in ("input", "change"):
        page.evaluate(f"{field}.dispatchEvent(new Event('{event}', {{bubbles: true}}))")


def articles(page):
    return page.evaluate("[...document.querySelectorAll('article .body')].map(body => body.textContent)")


def test_the_documentation_shows_every_route_and_asks_no_other_host(page, server):
    page.open(f"{server.url}/docs")
    page.wait_for("document.querySelectorAll('.opblock').length >= 10")
    page.evaluate("document.querySelector('.opblock-post .opblock-summary-control').click()")
    page.wait_for("document.querySelector('.opblock-body textarea, .opblock-body .highlight-code, .opblock-body pre')")


def test_an_answer_is_shown_while_it_is_written(page):
    """Typed, sent with Enter, grown piece by piece; at the end, how fast that was."""
    choose(page, "max_tokens", "800")
    page.evaluate("""(() => {
        window.lengths = new Set();
        const look = () => window.lengths.add(document.querySelector('article.assistant .body')?.textContent.length);
        new MutationObserver(look).observe(document.getElementById('messages'), {childList: true, subtree: true});
    })()""")
    ask(page)
    page.wait_for(DONE)
    assert page.evaluate("window.lengths.size") > 3
    figures = page.evaluate("document.querySelector('article.assistant .quiet').textContent")
    assert figures.startswith("800 tokens · ") and "tokens/s · first after" in figures
    assert "limit" in page.evaluate("document.querySelector('article.assistant .note').textContent")


def test_nothing_in_an_answer_runs(page):
    """Markdown becomes elements; HTML stays text, and a link that would run something is none."""
    choose(page, "max_tokens", "")
    ask(page)
    page.wait_for("document.querySelector('article.assistant li')")
    page.click("#send")
    page.wait_for(DONE)
    shown = "document.querySelector('article.assistant .markdown')"
    assert page.evaluate(f"{shown}.querySelector('strong').textContent") == "Bold"
    assert page.evaluate(f"{shown}.querySelector('pre code').textContent") == "<b>code</b>"
    assert "<script>document.title='owned'</script><img src=x" in page.evaluate(f"{shown}.textContent")
    assert page.evaluate(f"{shown}.querySelectorAll('script, img, a, b, iframe, style').length") == 0
    assert page.evaluate("document.title") == QUESTION


def test_stop_ends_the_answer_here_and_in_the_service(page, server):
    choose(page, "max_tokens", "")
    ask(page)
    page.wait_for("document.querySelector('article.assistant .body').textContent.length > 20")
    page.press("Escape")
    page.wait_for(DONE)
    assert page.evaluate("document.querySelector('article.assistant .note').textContent") == "Stopped."
    server.wait_for(running=0)
    assert page.evaluate("document.getElementById('send').getAttribute('aria-label')") == "Send"


def test_conversations_survive_a_reload(page):
    """Several of them; one is deleted, and comes back."""
    ask(page)
    page.wait_for(DONE)
    before = articles(page)
    page.click("#new")
    ask(page, "Second")
    page.wait_for(DONE)
    page.reload()
    titles = "[...document.querySelectorAll('#conversations a')].map(link => link.textContent)"
    assert page.evaluate(titles) == ["Second", QUESTION]
    page.click("#conversations li:last-child a")
    assert articles(page) == before
    page.evaluate("document.querySelector('#conversations li.current button:last-child').click()")
    assert page.evaluate(titles) == ["Second"]
    page.evaluate("document.querySelector('#toast button').click()")
    assert page.evaluate(titles) == ["Second", QUESTION]


def test_edit_and_regenerate(page):
    """What follows an edited message, or stood in the place of a new answer, is gone."""
    ask(page)
    page.wait_for(DONE)
    page.evaluate("document.querySelector('article.user button[aria-label=Edit]').click()")
    page.type("!")
    page.press("Enter")
    page.wait_for(f"document.querySelector('article.user .body')?.textContent === '{QUESTION}!' && {DONE}")
    assert len(articles(page)) == 2
    page.evaluate("document.querySelector('article.assistant button[aria-label=Regenerate]').click()")
    page.wait_for(DONE)
    assert [text[: len(QUESTION) + 1] for text in articles(page)][0] == f"{QUESTION}!"
    assert len(articles(page)) == 2


def test_settings_reach_the_service_and_the_page(page, server):
    """Language and appearance change at once; the seed and the rest go with the next question."""
    page.click("#open-settings")
    for name, value in (("language", "zh"), ("theme", "dark"), ("seed", "7"), ("system", "Be brief.")):
        choose(page, name, value)
    page.press("Escape")
    assert page.evaluate("document.getElementById('new').textContent") == "新对话"
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(27, 26, 25)"
    # only what is posted: the page may ask for the model's name at any time, and that has no body
    page.evaluate("(old => window.fetch = (url, options) => (window.sent ??= options.body, old(url, options)))(fetch)")
    ask(page)
    page.wait_for(DONE)
    sent = json.loads(page.evaluate("window.sent"))
    assert (sent["seed"], sent["max_tokens"], sent["temperature"]) == (7, 60, 0)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_what_the_service_refuses_is_shown(page):
    ask(page, "x" * 6000)
    page.wait_for("document.querySelector('article.assistant .note.error')")
    assert "context" in page.evaluate("document.querySelector('article.assistant .note').textContent")
    page.complaints.clear()  # the browser reports the status 400, too


def test_every_control_has_a_name(page):
    """What a screen reader says of buttons and fields, in both languages."""
    ask(page)
    page.wait_for(DONE)
    nameless = """[...document.querySelectorAll('button, input, textarea, select')].filter(control =>
        !(control.getAttribute('aria-label') || control.textContent.trim() || control.labels?.[0]?.textContent.trim()))
        .map(control => control.outerHTML)"""
    assert page.evaluate(nameless) == []


def test_only_the_files_of_the_page_are_served(server):
    """With headers that let a browser run and load nothing but them."""
    with urllib.request.urlopen(server.url) as reply:
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        tag = reply.headers["ETag"]
    for path in FOLDER.iterdir():
        name = "" if path.name == "index.html" else path.name
        with urllib.request.urlopen(f"{server.url}/{name}") as reply:
            assert reply.read() == path.read_bytes()
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(urllib.request.Request(server.url, headers={"If-None-Match": tag}))
    for path in ("/index.html", "/../settings.py", "/%2e%2e/settings.py", "/page/app.js", "//etc/passwd"):
        assert server.get(path)[0] == 404
