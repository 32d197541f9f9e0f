from vllm_accel.speculate import DraftBook, Verdict, draft_room


def test_a_draft_is_found_at_its_position_only():
    book = DraftBook()
    book.note("a", 10, [5, 6])
    assert book.draft("a", 10) == (5, 6)
    assert book.draft("a", 11) == book.draft("b", 10) == ()
    book.drop(["a", "b"])
    assert book.draft("a", 10) == ()


def test_a_verdict_is_matched_by_position_and_tokens():
    book = DraftBook()
    book.note("a", 10, [5, 6, 7])
    assert book.settle("a", 10, [5, 6, 7], 3) == Verdict("a", 10, 3, 3, 2)


def test_a_shortened_draft_counts_what_was_verified():
    book = DraftBook()
    book.note("a", 10, [5, 6, 7])
    assert book.settle("a", 10, [5, 6], 3) == Verdict("a", 10, 3, 2, 2)


def test_padding_is_not_a_verified_token():
    book = DraftBook()
    book.note("a", 10, [5, 6])
    assert book.settle("a", 10, [5, -1], 1) == Verdict("a", 10, 2, 1, 0)


def test_a_draft_from_another_position_teaches_nothing():
    book = DraftBook()
    book.note("a", 10, [5, 6])
    assert book.settle("a", 11, [5, 6], 2) is None
    assert book.settle("a", 10, [5, 6], 2) is None


def test_tokens_nobody_drafted_teach_nothing():
    book = DraftBook()
    book.note("a", 10, [5, 6])
    assert book.settle("a", 10, [0, 0], 1) is None
    assert book.settle("b", 10, [5, 6], 1) is None


def test_requests_that_end_leave_the_book():
    book = DraftBook()
    book.note("a", 10, [5])
    book.note("b", 3, [6])
    book.keep_only({"b": "still running"})
    assert len(book) == 1


def room(num_tokens, **limits):
    defaults = {"max_model_len": 100, "max_tokens": None, "min_tokens": 0}
    return draft_room(num_tokens=num_tokens, num_prompt_tokens=10, **defaults | limits)


def test_room_ends_one_before_the_models_length():
    assert [room(n) for n in (90, 98, 99)] == [9, 1, 0]


def test_room_ends_one_before_max_tokens():
    assert [room(n, max_tokens=5) for n in (11, 13, 14)] == [3, 1, 0]


def test_a_draft_does_not_reach_past_min_tokens():
    assert [room(n, min_tokens=5) for n in (11, 14, 15)] == [3, 0, 84]
