"""Cleaning: planted dirt goes, clean text stays letter for letter, and the result depends on the input alone."""

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from command_line import UserError
from text.cleaning import duplicates, pipeline, rules
from text.cleaning.__main__ import main
from text.cleaning.measure import HAN, LETTER, SYMBOL, measure
from text.cleaning.personal_data import is_id_card, mask_personal_data
from text.cleaning.repair import Repairer, read_patterns

ROOT = Path(__file__).resolve().parent.parent

# Running text of chance words repeats itself as little as real text does; the sentences look like what patterns seek
CHARACTERS = (
    "春秋夜雨风雪河山田园花草树木书信灯火门窗人家老少师友来去问答读写"
    "听说走坐想看做用东西南北上下前后大小高低远近明暗新旧黑白长短"
)
SYLLABLES = [
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "la",
    "me",
    "ni",
    "po",
    "ru",
    "sa",
    "te",
    "vi",
    "wo",
    "zu",
    "har",
    "len",
    "mor",
    "tin",
    "sol",
    "ver",
]
CHINESE = [
    "小李点击鼠标，打开文件，发现里面的表格已经被人修改了。",
    "他登录后先读了三封信，然后关上窗户。",
    "她一直关注着天气和收成。",
    "老师问：“你为什么迟到？”学生低着头。",
    "书的首页有一幅插图，下一页是目录。",
    "这家店的老板说，版权属于作者本人。",
    "我想分享到这里为止的经历。",
    "水加热到一百摄氏度时沸腾。",
]
ENGLISH = [
    "“Why are you late?” asked the teacher; the boy said nothing.",
    "The café’s naïve décor hasn’t changed since 1962.",
    "He left a comment in the margin and read more than he had planned.",
    "We follow the path home, about 12 km.",
    "She explained how copyright began in 1710.",
    "Click beetles are not rare in this wood.",
    "The menu had soup (£3) and bread.",
    "They shared the bread and searched the attic.",
]


def sentences(language, count, generator):
    """Sentences of chance words with a real one among them."""
    result = []
    for _ in range(count):
        if language is CHINESE:
            clauses = ("".join(generator.choices(CHARACTERS, k=generator.randint(4, 9))) for _ in range(3))
            result.append("，".join(clauses) + "。")
        else:
            words = ("".join(generator.choices(SYLLABLES, k=generator.randint(1, 3))) for _ in range(12))
            result.append(" ".join(words).capitalize() + ".")
    result[generator.randrange(count)] += ("" if language is CHINESE else " ") + generator.choice(language)
    return result


def clean_documents(count, generator):
    """Texts of both languages and several shapes, no two alike: a line, paragraphs, a dialogue, verse, a list, code."""
    documents = []
    for number in range(count):
        language = (CHINESE, ENGLISH)[number % 2]
        separator = generator.choice(["\n", "\n\n", "" if language is CHINESE else " "])
        documents.append(separator.join(sentences(language, generator.randint(2, 7), generator)))
    documents += [
        "def mean(values):\n    # the sum over the count\n    total = sum(values[0:])\n"
        "    return total / len(values) if values[1:] else 0\n",
        "# 标题\n\n- 第一项：苹果和梨\n- 第二项：`a[1] = b[2]`\n\n---\n\n| 名称 | 数量 |\n|---|---|\n| 苹果 | 3 |",
        "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
        "👩‍👩‍👧 一家三口去公园，玩得很开心 🎉。Ω 和 µ 是希腊字母，€5 是价格，½ 是一半。",
        "می‌خواهم کتاب بخوانم و بعد به خانه بروم، چون هوا سرد است.",
        "ｆｕｌｌ　ｗｉｄｔｈ，全角字符和“引号”都要原样保留；价格：￥３００。",
    ]
    return [document.strip() for document in documents]


def read_wrongly(text, right, wrong):
    return text.encode(right).decode(wrong, "replace")


def planted_dirt(generator):
    """{kind: [(document, what may be left of it, None: nothing)]} — the documents with dirt around clean text."""

    def zh(n=4):
        return "".join(sentences(CHINESE, n, generator))

    def en(n=4):
        return " ".join(sentences(ENGLISH, n, generator))

    both = [zh, en] * 10
    dirt = {}

    def plant(kind, pairs):
        dirt[kind] = list(pairs)

    texts = [make() + "“…”" for make in both]
    plant("UTF-8 read as Latin-1", [(read_wrongly(t, "utf-8", "latin-1"), t) for t in texts])
    plant(
        "UTF-8 read as GBK",
        [(read_wrongly(t + "\n", "utf-8", "gb18030").strip(), None) for t in (zh() for _ in range(20))],
    )
    plant(
        "lost characters",
        [
            (t[:9] + generator.choice(["锟斤拷锟斤拷", "烫烫烫烫", "\ufffd\ufffd"]) + t[9:], t)
            for t in (make() for make in both)
        ],
    )
    plant("zero-width and control characters", [
        ("".join(c + generator.choice(["", "", "\u200b", "\ufeff", "\x00", "\u00ad", "\x08"]) for c in t), t)
        for t in (make() for make in both)
    ])  # fmt: skip
    plant("markup", [
        (f"<!DOCTYPE html><html><head><style>p {{color: red}}</style></head><body><div class='x'><p>{t}</p>"
         "<script type='text/javascript'>var a = 1 < 2; track(a);</script><!-- ad --></div></body></html>", t)
        for t in (make() for make in both)
    ])  # fmt: skip
    plant("entities", [(f"{t}&nbsp;&nbsp;&copy;&#20013;", t + "  ©中") for t in (make() for make in both)])
    plant("forum marks", [(f"[b][color=red]{t}[/color][/b][编辑]", t) for t in (make() for make in both)])
    lines = {
        "navigation": [
            "首页 > 新闻中心 > 国内新闻",
            "上一篇：某地举行运动会",
            "Home | About Us | Contact",
            "Read more »",
            "返回顶部",
        ],
        "advertising": [
            "点击这里领取优惠券",
            "限时优惠！全场五折起",
            "加微信：abc12345 咨询",
            "Click here to get your FREE trial today!",
            "Subscribe to our newsletter for weekly updates",
        ],
        "sharing": [
            "关注微信公众号，获取更多资讯",
            "分享到：微信 微博 QQ空间",
            "Share on Facebook",
            "Follow us on Twitter and Instagram",
            "长按识别二维码",
        ],
        "boilerplate": [
            "版权所有 © 2012-2020 某某网 保留所有权利",
            "京ICP备12345678号-1",
            "Copyright © 2019 Example Inc. All rights reserved.",
            "This website uses cookies to improve your experience.",
            "责任编辑：王某",
        ],
        "link heaps": [
            "http://a.example.com/x?y=1 http://b.example.com/z https://www.example.org/q",
            "https://t.cn/abcdef",
        ],
        "symbol heaps": ["★☆★☆★☆★☆★☆★☆", "》》》》》》====《《《《《《", "!@#$%^&*()_+!@#$%^&*()"],
        "scripts": ["document.write('<a>');", "window.dataLayer = window.dataLayer || [];", "var _hmt = _hmt || [];"],
    }  # fmt: skip
    for kind, choices in lines.items():
        pairs = []
        for index, make in enumerate(both):
            t = make()
            pairs.append((f"{t}\n{choices[index % len(choices)]}", t))
        plant(kind, pairs)
    plant("repeated lines", [("\n".join([t] * 8), None) for t in (make(1) for make in both)])
    plant(
        "repeated words",
        [
            (word * 30 + str(n), None)
            for n, word in enumerate(["好好好看看看", "买一送一快来买", "buy this now ", "best price best "] * 5)
        ],
    )
    plant(
        "symbols for words",
        [("".join(generator.choice("#$%^&*~@=+<>") for _ in range(60)) + "abc", None) for _ in range(20)],
    )
    plant("too short", [(t, None) for t in ["ok", "好", "1 2", "…", "a b"] * 4])
    plant("numbers only", [(" ".join(str(generator.randrange(10**6)) for _ in range(40)), None) for _ in range(20)])
    return dirt


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder, clean documents, dirt, near doubles): one file of clean text, one of dirt, one of doubles."""
    generator = random.Random(0)
    clean, dirt = clean_documents(400, generator), planted_dirt(generator)
    long = [" ".join(sentences(ENGLISH, 8, generator)) for _ in range(10)]
    long += ["".join(sentences(CHINESE, 8, generator)) for _ in range(10)]
    doubles = [text[:-9] + ("!" if text.isascii() else "！") for text in long]
    folder = tmp_path_factory.mktemp("raw")
    for name, texts in (
        ("a_clean", clean + long),
        ("b_dirt", [document for pairs in dirt.values() for document, _ in pairs]),
        ("c_doubles", clean[:50] + doubles),
    ):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder, clean + long, dirt, clean[:50] + doubles


def read(path):
    data = Path(path).read_bytes()
    lines = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode().splitlines()
    return [json.loads(line)["text"] for line in lines]


def cleaned(folder, out, *options):
    main(["--input", str(folder), "--output", str(out), "--num_workers", "1", *options])
    return read(out)


def test_planted_dirt_goes_and_clean_text_stays_letter_for_letter(corpus, tmp_path):
    folder, clean, dirt, doubles = corpus
    kept = set(cleaned(folder, tmp_path / "clean.jsonl", "--rejected", str(tmp_path / "rejected.jsonl")))
    lost = [text for text in clean if text not in kept]
    assert len(lost) <= 0.005 * len(clean), lost
    assert len(dirt) >= 12
    left = {
        kind: [d for d, rest in pairs if d in kept or (rest is not None and rest not in kept)]
        for kind, pairs in dirt.items()
    }
    n_dirty = sum(map(len, dirt.values())) + len(doubles)
    n_left = sum(map(len, left.values())) + len(kept & set(doubles) - set(clean))
    assert n_left <= 0.05 * n_dirty, {kind: texts for kind, texts in left.items() if texts}
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert reasons.count("duplicate") >= 50 and reasons.count("near duplicate") >= 15


# ------------------------------------------------------------------------------------------- the same from every way


def test_the_result_does_not_depend_on_the_number_of_processes_nor_on_interruptions(corpus, tmp_path, monkeypatch):
    folder = corpus[0]
    monkeypatch.setattr(pipeline, "PART_CHARS", 20_000)
    once = cleaned(folder, tmp_path / "one.jsonl", "--rejected", str(tmp_path / "r1.jsonl"))
    write, calls = pipeline.Part.write, []

    def stops(part, result):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(part.name)
        write(part, result)

    monkeypatch.setattr(pipeline.Part, "write", stops)
    options = ["--input", str(folder), "--output", str(tmp_path / "two.jsonl"), "--num_workers", "1"]
    with pytest.raises(KeyboardInterrupt):
        main(options)
    monkeypatch.setattr(pipeline.Part, "write", write)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "two.jsonl.work").glob("part*.json")}
    assert len(made) == 3
    monkeypatch.setattr(pipeline, "finish", lambda parts, *rest: None)
    main_without_end(options)
    assert {path: path.stat().st_mtime_ns for path in made} == made  # these were not made again
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "PART_CHARS", 20_000)
    main(options)
    assert read(tmp_path / "two.jsonl") == once and not (tmp_path / "two.jsonl.work").exists()
    two = ["--input", str(folder), "--output", str(tmp_path / "x.jsonl.gz"), "--rejected", str(tmp_path / "r2.jsonl")]
    main([*two, "--num_workers", "2"])
    assert read(tmp_path / "x.jsonl.gz") == once
    assert (tmp_path / "r2.jsonl").read_bytes() == (tmp_path / "r1.jsonl").read_bytes()


def main_without_end(options):
    with pytest.raises(TypeError):  # there are no statistics to print
        main(options)


def test_other_options_do_not_meet_old_parts(corpus, tmp_path):
    """A folder that is not ours is left alone."""
    config = pipeline.CleaningConfig(input=[str(corpus[0])], output=str(tmp_path / "o.jsonl"))
    files = pipeline.input_files(config)
    folder = pipeline.open_work_folder(config, files)
    (folder / "part").write_text("x")
    assert (pipeline.open_work_folder(config, files) / "part").exists()
    other = pipeline.CleaningConfig(input=[str(corpus[0])], output=str(tmp_path / "o.jsonl"), min_words=9)
    assert not (pipeline.open_work_folder(other, files) / "part").exists()
    (tmp_path / "mine").mkdir()
    foreign = pipeline.CleaningConfig(input=[str(corpus[0])], work_dir=str(tmp_path / "mine"))
    with pytest.raises(UserError, match="not a work folder"):
        pipeline.open_work_folder(foreign, files)


def test_the_report_counts_by_reason_and_shows_what_a_threshold_would_change(corpus, tmp_path):
    cleaned(corpus[0], tmp_path / "c.jsonl", "--report", str(tmp_path / "r.html"))
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rejected"]["duplicate"]["count"] == 50
    assert report["read"]["documents"] == report["kept"]["documents"] + sum(
        e["count"] for e in report["rejected"].values()
    )
    rows = report["thresholds"]["too few words"]
    (now,) = [row for row in rows if row["in_force"]]
    assert now["documents"] == report["rejected"]["too few words"]["count"]
    assert [row["documents"] for row in rows] == sorted(row["documents"] for row in rows)
    page = (tmp_path / "r.html").read_text()
    assert "near duplicate" in page and "--min_words" in page and "京ICP备12345678号" in page


def test_contaminated_documents_go(tmp_path):
    question = "How many steps does the old lighthouse keeper climb every single evening before the ships come in?"
    (tmp_path / "test.json").write_text(
        json.dumps([{"question": question, "answer": "12"}, {"question": "法国的首都是哪里？"}])
    )
    documents = [
        f"Here is a riddle. {question.upper()} Nobody knew.",
        "他问道：法国的首都，是哪里？没有人回答。",
        "法国的首都在塞纳河边，没有人不知道。",
        "How many steps does the lighthouse have? The keeper climbs it every single evening.",
    ]
    (tmp_path / "raw.txt").write_text("\n".join(documents))
    kept = cleaned(tmp_path / "raw.txt", tmp_path / "c.jsonl", "--test_sets", str(tmp_path / "test.json"))
    assert kept == documents[2:]
    (tmp_path / "short.txt").write_text("one two\n")
    with pytest.raises(UserError, match="no text of 6 words"):
        cleaned(tmp_path / "raw.txt", tmp_path / "c.jsonl", "--test_sets", str(tmp_path / "short.txt"))


# ------------------------------------------------------------------------------------------------------------ one text


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("He said \ud83d hello to them all", "He said \ufffd hello to them all".replace("\ufffd", "")),
        ("one line\r\nanother\rthird", "one line\nanother\nthird"),
        ("cafe\u0301 cre\u0300me", "café crème"),
        ("AT&amp;amp;T says &lt;b&gt;hello&lt;/b&gt; there", "AT&T says hello there"),
        ("维基百科[1]说，水沸腾。[23] a[1] = 2", "维基百科说，水沸腾。 a[1] = 2"),
        ("👩\u200d👩\u200d👧 می\u200cخواهم", "👩\u200d👩\u200d👧 می\u200cخواهم"),
        ("a < b and b > c; if x<y then <unknown> stays", "a < b and b > c; if x<y then <unknown> stays"),
        ("锛是一种工具，很少有人用。", "锛是一种工具，很少有人用。"),
        ("Follow us to the court. Thou churl, for this time, though full of our displeasure, yet we free thee.", None),
    ],
)
def test_what_is_broken_is_mended_and_nothing_else(dirty, clean):
    assert Repairer()(dirty)[0] == (dirty if clean is None else clean)


def test_mending_twice_changes_nothing_more():
    generator = random.Random(1)
    repair = Repairer()
    for pairs in planted_dirt(generator).values():
        for document, _ in pairs[:5]:
            once = repair(document)[0]
            assert repair(once) == (once, [])


def test_a_long_line_loses_the_sentence_and_not_the_line():
    generator = random.Random(2)
    before, after = "".join(sentences(CHINESE, 6, generator)), "".join(sentences(CHINESE, 6, generator))
    text, removed = Repairer()(before + "请关注微信公众号，获取更多资讯。" + after)
    assert text == before + after and removed == [("sharing", "请关注微信公众号，获取更多资讯。")]


def test_users_extend_the_list_of_patterns(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n[our shop]\n^welcome to \\w+ shop$\n")
    assert Repairer(str(path))("Some text.\nWelcome to 我的 shop")[1] == [("our shop", "Welcome to 我的 shop")]
    path.write_text("fine\n(broken\n")
    with pytest.raises(UserError, match="line 2 of .*mine.txt is no pattern"):
        Repairer(str(path).replace("mine", "./mine"))
    assert len({group for group, _ in read_patterns(str(ROOT / "text/cleaning/patterns.txt"))}) >= 6


def test_conversions_are_options():
    assert Repairer(normalization="nfkc")("Ｆｕｌｌ　ｗｉｄｔｈ①")[0] == "Full width1"
    assert Repairer(lower_case=True, strip_punctuation=True)("Hello, World。")[0] == "hello world"
    pytest.importorskip("opencc")
    assert Repairer(han="simplified")("漢語和軟體")[0].startswith("汉语和软")


def test_personal_data_is_masked_where_its_check_digits_are_right():
    text = (
        "邮箱 zhang.san@example.com.cn，手机 13812345678，身份证 11010519491231002X，卡号 4111 1111 1111 1111。"
        "Call (212) 555-0123."
    )
    masked, counts = mask_personal_data(text)
    assert masked == "邮箱 [EMAIL]，手机 [PHONE]，身份证 [ID_CARD]，卡号 [BANK_CARD]。Call [PHONE]."
    assert counts == {"email": 1, "phone": 2, "id_card": 1, "bank_card": 1}
    assert is_id_card("11010519491231002X") and not is_id_card("110105194912310021")
    left = "订单 110105194912310021，流水 4111 1111 1111 1112，共 12345678 元，版本 1.2.3，日期 2020-10-11，@某人"
    assert mask_personal_data(left) == (left, {})


# ----------------------------------------------------------------------------------------- measured, by plain Python


def random_texts(generator, count):
    pieces = [
        "word",
        "Word",
        "the",
        "3rd",
        "42",
        "，",
        "。",
        " ",
        "\n",
        "好",
        "人",
        "民",
        "é",
        "🎉",
        "𠀀",
        "_x",
        "#",
        "e\u0301",
    ]
    return ["".join(generator.choices(pieces, k=generator.randint(1, 60))) for _ in range(count)]


def test_arrays_count_as_plain_python_does():
    texts = random_texts(random.Random(3), 200)
    measured = measure(texts)
    word = re.compile(r"[好人民𠀀]|(?:[^\W好人民𠀀]|\u0301)+")
    words = [word.findall(text.lower()) for text in texts]
    assert measured.n_words.tolist() == [len(found) for found in words]
    assert measured.kinds[:, HAN].tolist() == [sum(text.count(c) for c in "好人民𠀀") for text in texts]
    assert measured.kinds[:, SYMBOL].tolist() == [text.count("🎉") for text in texts]
    assert measured.kinds.sum(1).tolist() == [len(text) for text in texts] and measured.kinds[:, LETTER].any()
    assert measured.words_of_digits.tolist() == [sum(w.isdigit() for w in found) for found in words]
    known = {}
    for found, start in zip(words, measured.first_word, strict=False):
        for offset, text in enumerate(found):  # equal words hash alike, different ones do not
            assert known.setdefault(text, measured.word_hashes[start + offset]) == measured.word_hashes[start + offset]
    assert len(set(known.values())) == len(known)
    for n in (1, 2, 5):
        again, most = measured.repeated(n)
        runs = [list(zip(*(found[k:] for k in range(n)), strict=False)) for found in words]
        assert again.tolist() == [len(found) - len(set(found)) for found in runs]
        assert most.tolist() == [max(map(found.count, found), default=0) for found in runs]
    one_by_one = [measure([text]) for text in texts]
    assert np.array_equal(measured.word_hashes, np.concatenate([one.word_hashes for one in one_by_one]))
    assert np.array_equal(measured.line_hashes, np.concatenate([one.line_hashes for one in one_by_one]))


def test_repetition_is_gophers():
    """By hand: of "a b c d a b e f", the pair (a, b) makes 4 of 8 characters, and its limit is 0.2."""
    assert rules.repetition("a b c d a b e f") == pytest.approx(4 / 8 / 0.2)
    assert rules.repetition(" ".join(map(str, range(1000)))) == 0
    ten = "one two three four five six seven eight nine ten "
    rest = " ".join(f"x{n}" for n in range(40))
    assert rules.repetition(ten + ten + rest) == pytest.approx(39 / (78 + len(rest.replace(" ", ""))) / 0.10)


def test_similar_documents_are_found_as_by_comparing_every_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "SLICE", 1 << 12)  # several rounds
    generator = random.Random(4)
    texts = []
    for _ in range(60):
        words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(80)]
        texts.append(" ".join(words))
        for changed in (1, 8, 30):
            other = words.copy()
            for place in generator.sample(range(80), changed):
                other[place] = "changed"
            texts.append(" ".join(other))
    texts += texts[:20]
    measured = measure(texts)
    keys = np.array([duplicates.key_of(text) for text in texts], np.uint64)
    group, equal = duplicates.find_duplicates(keys, duplicates.signatures(measured), 0.7, tmp_path)

    def shingles(text):
        words = text.split()
        return set(zip(*(words[k:] for k in range(5)), strict=False))

    sets = [shingles(text) for text in texts]
    for index, own in enumerate(sets[:240]):
        best = max((len(own & other) / len(own | other) for other in sets[:index]), default=0)
        if best > 0.8:
            assert group[index] < index
        elif best < 0.6:
            assert group[index] == index
    assert equal[240:].all() and group[240:].tolist() == group[:20].tolist()


def test_lines_of_many_documents_stay_in_the_first_alone(tmp_path):
    generator = random.Random(5)
    body = [sentences(ENGLISH, 3, generator) for _ in range(9)]
    pages = ["\n".join([*lines, "Prices include tax and delivery"]) for lines in body]
    lines = "".join(json.dumps({"text": page}) + "\n" for page in pages)
    (tmp_path / "a.jsonl").write_text(lines)
    kept = cleaned(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    assert kept == [pages[0], *("\n".join(lines) for lines in body[1:])]
    assert cleaned(tmp_path / "a.jsonl", tmp_path / "d.jsonl", "--line_copies", "9") == pages
    assert cleaned(tmp_path / "a.jsonl", tmp_path / "e.jsonl", "--line_copies", "0") == pages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--input names nothing"),
        (["--input", "nowhere"], "no data at nowhere"),
        (["--input", "README.md", "--output", "x.parquet"], r"x\.parquet must end in \.jsonl or \.jsonl\.gz"),
        (["--input", "README.md", "--mask", "iris"], "does not know iris"),
        (["--input", "README.md", "--report", "r.txt"], "must end in .html"),
    ],
)
def test_mistakes_are_said_before_any_work(options, message):
    with pytest.raises(UserError, match=message):
        main(options)


def test_datatrove_gives_the_same(corpus, tmp_path):
    """Its own local executor, two tasks."""
    pytest.importorskip("datatrove")
    out = [str(tmp_path / name) for name in ("ours.jsonl", "theirs.jsonl")]
    once = cleaned(corpus[0], out[0])
    options = ["--input", str(corpus[0]), "--output", out[1], "--report", str(tmp_path / "r.html"), "--tasks", "2"]
    command = [sys.executable, "-m", "text.cleaning.datatrove_steps", *options, "--num_workers", "1"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert read(out[1]) == once and (tmp_path / "r.html").is_file()
    assert not Path(out[1] + ".work").exists()


def test_languages_can_be_chosen(tmp_path):
    pytest.importorskip("py3langid")
    documents = [
        "法国的首都是巴黎，它位于塞纳河畔，是欧洲最大的城市之一。",
        "The river rose during the night and by morning it had reached the bridge.",
        "Le fleuve a monté pendant la nuit et le matin il avait atteint le pont du village.",
    ]
    (tmp_path / "raw.txt").write_text("\n".join(documents))
    assert cleaned(tmp_path / "raw.txt", tmp_path / "c.jsonl", "--languages", "zh", "en") == documents[:2]
