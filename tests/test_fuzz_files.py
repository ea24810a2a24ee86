"""Files that somebody else wrote, bent: each is read, or refused with an error that was promised.
The corpus is that of the fuzzers, with what they found."""

import logging

import pytest
from tests.support.fuzz_files import CORPUS, TARGETS, corpus, own, seeds

pytestmark = pytest.mark.cpu_only("files")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_and_a_few_changes_of_it(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an input that fails is written there
    logging.disable(logging.CRITICAL)
    try:
        tried, fine = own(target, 0, len(corpus(target)) + 60, 1.0)
    finally:
        logging.disable(logging.NOTSET)
    assert tried > 60
    assert fine > 0 or target == "gguf", "not even what is whole was read"


def test_the_corpus_is_what_writes_it():
    for target, inputs in seeds().items():
        for number, data in enumerate(inputs):
            assert (CORPUS / target / f"seed{number}").read_bytes() == data, target
