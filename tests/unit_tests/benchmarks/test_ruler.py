"""Generated RULER tasks fill their length, can be solved by reading, and depend only on seed, task, length and index."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from refine_titan.benchmarks.metrics import RULER_TASKS, score
from refine_titan.benchmarks.ruler import niah, word_counts
from refine_titan.benchmarks.ruler.fitting import LengthTooShort, largest_fitting
from refine_titan.benchmarks.ruler.generate import RulerGenerator
from refine_titan.benchmarks.ruler.haystacks import MAX_SENTENCE_WORDS, SubstituteEssays, split_sentences
from refine_titan.benchmarks.tasks import NIAH_TASKS, load_samples
from refine_titan.data.needles import NOISE
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.data.words import ADJECTIVES, NOUNS
from refine_titan.errors import UserError

ROOT = Path(__file__).parents[3]
ESSAY_TASKS = [task for task, variant in niah.VARIANTS.items() if variant.haystack == "essays"]


def context_of(prompt: str) -> str:
    """The prompt without instruction, question and the start of the answer."""
    return prompt.split("afterwards.\n", 1)[1].rsplit("\nWhat ", 1)[0]


@pytest.mark.parametrize("length", [512, 1024, 4096, 16384])
@pytest.mark.parametrize("task", RULER_TASKS)
def test_prompt_and_answer_fill_the_length_within_two_percent_and_never_pass_it(tokenizer, task, length):
    generator = RulerGenerator(tokenizer, seed=5)
    try:
        samples = [generator.sample(task, length, index) for index in range(1 if length > 4096 else 5)]
    except UserError as error:
        shortest = int(re.search(r"allowed for the task: (\d+) and more", str(error)).group(1))
        assert length < shortest <= 1024, error
        samples = [generator.sample(task, shortest, index) for index in range(8)]
        length = shortest
    for sample in samples:
        total = len(tokenizer.encode(sample.prompt)) + sample.max_new_tokens
        assert 0.98 * length <= total <= length
        assert sample.length == length


@pytest.mark.slow
@pytest.mark.parametrize("task", RULER_TASKS)
def test_length_of_128K_tokens(hf_tokenizer, task):
    sample = RulerGenerator(hf_tokenizer, seed=0).sample(task, 131072, 0)
    assert 0.98 * 131072 <= len(hf_tokenizer.encode(sample.prompt)) + sample.max_new_tokens <= 131072


@pytest.mark.parametrize("task", RULER_TASKS)
def test_right_answers_score_one_and_other_responses_zero(tokenizer, task):
    generator = RulerGenerator(tokenizer, seed=1)
    for index in range(8):
        sample = generator.sample(task, 2048, index)
        response = " " + ", ".join(sample.answers)
        assert len(tokenizer.encode(response)) <= sample.max_new_tokens
        assert score("ruler", task, response, sample.answers) == {"reference_fraction": 1.0, "all_references": 1.0}
        for wrong in ("", " I do not know.", NOISE, " 0000000", SubstituteEssays().sentences(1)[0]):
            assert score("ruler", task, wrong, sample.answers)["reference_fraction"] == 0.0


def test_needles_can_be_found_by_reading(hf_tokenizer):
    """Every NIAH answer occurs once, after its key, and the question names exactly the keys of the answers."""
    generator = RulerGenerator(hf_tokenizer, seed=2)
    needle = re.compile(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.")
    for task in NIAH_TASKS:
        variant = niah.VARIANTS[task]
        for index in range(5):
            sample = generator.sample(task, 2048, index)
            found = needle.findall(context_of(sample.prompt))
            query = re.search(r"special magic \w+ for (.+?) mentioned in the provided text\?", sample.prompt).group(1)
            asked = [value for key, value in found if key in re.split(r", and |, ", query)]
            assert sorted(asked) == sorted(sample.answers)
            assert len(asked) == variant.num_queries * variant.values_per_key
            planted = variant.num_keys * variant.values_per_key
            assert len(found) == planted if variant.haystack != "needles" else len(found) > 10
            values = [value for _, value in found]
            assert len(set(values)) == len(values)
            assert sample.prompt.endswith(("provided text is", "provided text are"))


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_1", "niah_multikey_2"])
def test_forty_samples_have_forty_depths_and_needles_lie_there(hf_tokenizer, task):
    generator = RulerGenerator(hf_tokenizer, seed=3)
    samples = [generator.sample(task, 4096, index) for index in range(40)]
    assert sorted(sample.depth for sample in samples) == list(niah.DEPTHS)
    assert (niah.DEPTHS[0], niah.DEPTHS[-1]) == (0.0, 1.0)
    for sample in samples:
        context = context_of(sample.prompt)
        place = context.index(f"is: {sample.answers[0]}.") / len(context)
        assert place == pytest.approx(sample.depth, abs=0.06)  # sentences and other needles differ in length


def test_tasks_that_ask_for_several_have_no_depth(hf_tokenizer):
    generator = RulerGenerator(hf_tokenizer, seed=0)
    tasks = ("niah_multiquery", "niah_multivalue", "vt", "cwe", "fwe")
    assert {generator.sample(task, 1024, 0).depth for task in tasks} == {None}


def test_variables_are_found_by_following_the_chain(hf_tokenizer):
    generator = RulerGenerator(hf_tokenizer, seed=4)
    for length in (512, 2048):
        sample = generator.sample("vt", length, 0)
        text, question = sample.prompt.rsplit("Memorize and track", 1)[1].rsplit("Question:", 1)
        value = re.search(r"assigned the value (\d{5})", question).group(1)
        known = {value}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            assert source in known
            known.add(name)
        assert tuple(sorted(known - {value})) == tuple(sorted(sample.answers))
        assert len(sample.answers) == 5
    assert ("vt at 512 tokens: without the worked example" in generator.notes) and len(generator.notes) == 1


def test_common_words_have_every_length_from_the_shortest_on():
    """The lengths pass those at which the number of appearances changes and the worked example comes in."""
    generator = RulerGenerator(ByteTokenizer(), seed=8)
    for length in range(896, 8000, 130):
        sample = generator.sample("cwe", length, 0)
        assert 0.98 * length <= len(sample.prompt) + sample.max_new_tokens <= length


def test_common_words_are_the_most_frequent(tokenizer):
    generator = RulerGenerator(tokenizer, seed=6)
    for length, times in ((1024, None), (4096, None), (16384, (30, 3))):
        for index in range(3):
            sample = generator.sample("cwe", length, index)
            listed = sample.prompt.rsplit("most often.\n", 1)[1].rsplit("\nQuestion:", 1)[0]
            counts = Counter(re.findall(r"\d+\. (\S+)", listed))
            top = counts.most_common(11)
            assert {word for word, _ in top[:10]} == set(sample.answers)
            assert top[9][1] > top[10][1]
            if times:
                assert (top[0][1], top[9][1], top[10][1]) == (times[0], times[0], times[1])
            for answer in sample.answers:
                assert not any(answer in other for other in counts if other != answer)


def test_frequent_words_are_the_most_frequent_after_the_dots(tokenizer):
    generator = RulerGenerator(tokenizer, seed=7)
    for length in (1024, 4096, 16384):
        sample = generator.sample("fwe", length, 0)
        words = sample.prompt.split("coded words. ", 1)[1].split("\nQuestion:")[0].split()
        counts = Counter(words).most_common(5)
        assert counts[0][0] == word_counts.DOTS
        assert tuple(word for word, _ in counts[1:4]) == sample.answers
        assert counts[3][1] > counts[4][1]


def test_zipf_counts_fall_with_the_rank_and_the_fourth_is_ahead():
    for num_words in range(word_counts.MIN_FREQUENT_WORDS, 5000):
        counts = word_counts.zipf_counts(num_words)
        assert counts[3] >= 2 and counts[3] > max(counts[4:])
        assert counts == sorted(counts, reverse=True)


def digest(samples) -> str:
    fields = [{name: value for name, value in asdict(sample).items() if name not in OF_FILES} for sample in samples]
    return hashlib.sha256(repr([sorted(found.items()) for found in fields]).encode()).hexdigest()


PROGRAM = """
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.benchmarks.ruler.generate import RulerGenerator
from refine_titan.benchmarks.metrics import RULER_TASKS
from tests.unit_tests.benchmarks.test_ruler import digest
generator = RulerGenerator(ByteTokenizer(), seed=11)
for task in reversed(RULER_TASKS):
    print(task, digest([generator.sample(task, 2048, index) for index in (1, 0)][::-1]))
"""


def test_equal_seeds_give_equal_bytes_in_any_order_and_in_another_process():
    generator = RulerGenerator(ByteTokenizer(), seed=11)
    here = {task: digest([generator.sample(task, 2048, index) for index in (0, 1)]) for task in RULER_TASKS}
    environment = os.environ | {"PYTHONHASHSEED": "4321", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert dict(line.split() for line in output.splitlines()) == here


def test_seed_number_and_length_change_every_sample():
    def prompts(seed: int, length: int) -> set[str]:
        generator = RulerGenerator(ByteTokenizer(), seed)
        return {generator.sample(task, length, index).prompt for task in RULER_TASKS for index in range(3)}

    sets = [prompts(0, 2048), prompts(1, 2048), prompts(0, 2049)]
    assert all(len(found) == 3 * len(RULER_TASKS) for found in sets)
    assert len(set.union(*sets)) == 9 * len(RULER_TASKS)


def test_samples_have_the_bytes_of_this_version():
    """Whoever changes a prompt must raise generate.VERSION, or caches mix samples of two versions."""
    generator = RulerGenerator(ByteTokenizer(), seed=0)
    digests = {task: digest([generator.sample(task, 4096, 0)])[:12] for task in RULER_TASKS}
    assert digests == KNOWN_DIGESTS


# Fields that only samples from files have.
OF_FILES = ("metric", "classes")
KNOWN_DIGESTS = {
    "niah_single_1": "a7a62530e5ae",
    "niah_single_2": "e9fd7d8ede5a",
    "niah_single_3": "9963b6de848b",
    "niah_multikey_1": "45d6347aa36a",
    "niah_multikey_2": "2cadba036e0f",
    "niah_multikey_3": "0ee8e2ed291e",
    "niah_multiquery": "b49ec9fdaad2",
    "niah_multivalue": "793b9f312ca2",
    "vt": "e1da8bc10aac",
    "cwe": "6d537fd0140b",
    "fwe": "20a4b8c30b69",
}


def test_cached_samples_are_the_generated_ones(hf_tokenizer, tmp_path):
    def load(seed=0, tokenizer=hf_tokenizer, **settings):
        return load_samples("niah", tokenizer=tokenizer, lengths=[1024], num_samples=2, seed=seed, cache_folder=tmp_path, **settings)

    first = load()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(files) == 16
    assert load() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == files
    assert first.notes == (SubstituteEssays.note,)

    torn, changed = sorted(files)[:2]
    torn.write_bytes(torn.read_bytes()[:100])
    changed.write_text(changed.read_text().replace("special magic", "special tragic"))
    assert load() == first  # the damaged files are generated again

    assert not set(load(seed=1).samples) & set(first.samples)
    assert load(tokenizer=ByteTokenizer()).samples != first.samples
    assert len(list(tmp_path.rglob("*.json"))) == 48
    essays = tmp_path / "essays"
    essays.mkdir()
    (essays / "one.txt").write_text("Rain fell. " * 50)
    assert load(essay_folder=str(essays)).samples != first.samples
    assert len(list(tmp_path.rglob("*.json"))) == 48 + 2 * len(ESSAY_TASKS)


def test_essays_come_from_the_folder_and_every_result_says_so(hf_tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("Second text here. " * 3, encoding="utf-8")
    (tmp_path / "a.md").write_text("First  text\nhere! Is it? " * 3, encoding="utf-8")
    (tmp_path / "sub" / "c.rst").write_text("Not read.")
    found = load_samples("ruler/niah_single_2", tokenizer=hf_tokenizer, lengths=[1024], num_samples=1, essay_folder=str(tmp_path))
    context = context_of(found.samples[0].prompt)
    assert "First text here! Is it? First text here! Is it?" in context
    assert "Is it? Second text here." in context
    assert "Not read" not in context
    assert found.notes[0].startswith(f"haystack: essays of {tmp_path} (24 words, sha256 ")
    assert found.notes[1:] == ("haystack: the essays are repeated to fill it",)
    noise = load_samples("ruler/niah_single_1", tokenizer=hf_tokenizer, lengths=[1024], num_samples=1)
    assert noise.notes == ()


@pytest.mark.parametrize("text", ["x" * 50_000, "日本語のとても長い文章" * 3000, "no stop " * 5000, "a.b.c." * 9000])
def test_any_text_can_be_a_haystack(hf_tokenizer, tmp_path, text):
    (tmp_path / "essay.txt").write_text(text, encoding="utf-8")
    for length in (2048, 4096):
        sample = RulerGenerator(hf_tokenizer, 0, str(tmp_path)).sample("niah_single_2", length, 0)
        assert 0.98 * length <= len(hf_tokenizer.encode(sample.prompt)) + sample.max_new_tokens <= length


def test_unusable_essay_folders_are_named(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    binary = tmp_path / "binary"
    binary.mkdir()
    (binary / "x.txt").write_bytes(b"\xff\xfe\x00")
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "x.txt").write_text(" \n")
    for folder, message in (
        (tmp_path / "nowhere", "no such folder"),
        (empty, "holds no file ending in .txt or .md"),
        (binary, "is not UTF-8"),
        (blank, "hold no text"),
    ):
        with pytest.raises(UserError, match=message):
            RulerGenerator(ByteTokenizer(), 0, str(folder))


def test_sentences_without_an_end_are_cut():
    assert split_sentences('He said "no." Then  left!\nWhy?') == ['He said "no.', "Then left!", "Why?"]
    assert [len(s.split()) for s in split_sentences("word " * 100)] == [MAX_SENTENCE_WORDS, MAX_SENTENCE_WORDS, 20]
    assert list(map(len, split_sentences("x" * 700))) == [300, 300, 100]
    assert list(map(len, split_sentences(f"{'x' * 200} " * 2))) == [200, 200]


def test_substitute_essays_are_varied_and_the_same_for_any_number():
    essays = SubstituteEssays()
    sentences = essays.sentences(3000)
    assert len(set(sentences)) > 2990
    assert SubstituteEssays().sentences(10) == sentences[:10] == essays.sentences(10)
    assert len(set(" ".join(sentences).lower().split())) > 2000
    assert not re.search(r"\d|\bA_|\{|\ba [aeiou]|\ban [^aeiou]", " ".join(sentences))


def test_words_are_no_part_of_each_other():
    words = [*ADJECTIVES, *NOUNS]
    text = " ".join(words)
    assert all(text.count(word) == 1 for word in words)
    assert len(ADJECTIVES) * len(NOUNS) > 700_000  # keys of needles; 200,000 of them fit into the longest haystack


def test_search_takes_few_calls_and_finds_the_largest():
    calls = []

    def count(units: int) -> int:
        calls.append(units)
        return 200 + 7 * units

    assert largest_fitting(count, 512, minimum=1, maximum=1 << 24) == (512 - 200) // 7
    assert len(calls) <= 6
    calls.clear()
    assert 0.995 * 10**6 <= count(largest_fitting(count, 10**6, minimum=1, maximum=1 << 24)) <= 10**6
    assert len(calls) <= 5
    assert largest_fitting(count, 10**6, minimum=1, maximum=10) == 10
    with pytest.raises(LengthTooShort) as error:
        largest_fitting(count, 206, minimum=1, maximum=10)
    assert error.value.tokens == 207


def test_search_ends_where_units_cost_nothing_or_unequal():
    assert largest_fitting(lambda units: 100, 512, minimum=0, maximum=10_000) == 10_000
    for budget in range(60, 900, 7):
        found = largest_fitting(lambda units: 50 + units**2 // 3, budget, minimum=0, maximum=1000)
        assert 50 + found**2 // 3 <= budget
        assert 50 + (found + 1) ** 2 // 3 > budget or 50 + found**2 // 3 >= 0.995 * budget


@pytest.mark.parametrize("length", [0, -5, 1 << 23])
def test_impossible_lengths_are_refused(length):
    with pytest.raises(UserError, match=f"lengths holds {length}; allowed: 1 to"):
        RulerGenerator(ByteTokenizer(), 0).sample("vt", length, 0)
