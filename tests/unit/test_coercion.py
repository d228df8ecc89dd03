"""What a value says that may have come as text: numbers, booleans and lists, and what is none of them."""

import math

import pytest

from flashserve.coercion import bool_of, integer_of, list_of, number_of, plain, same, shorten


def shown(value):
    """A value with its type, as True == 1 == 1.0 in Python."""
    return type(value), value


@pytest.mark.parametrize(
    ("given", "number"),
    [(4, 4), (0.5, 0.5), ("4", 4), (" -4 ", -4), ("+4", 4), ("0.5", 0.5), (".5", 0.5), ("4.", 4.0), ("1e2", 100.0)],
)
def test_numbers_may_come_as_text(given, number):
    assert shown(number_of(given)) == shown(number)


@pytest.mark.parametrize(
    "given", ["", " ", "four", "nan", "inf", "1_0", "0x10", "٣", "1 2", "True", True, False, None, [4], {}, "9" * 65]
)
def test_what_is_no_number(given):
    assert number_of(given) is None
    assert integer_of(given) is None


def test_numbers_that_json_can_hold_stay_as_they_are_for_the_range_to_judge():
    assert math.isnan(number_of(math.nan)) and number_of("1e999") == math.inf
    assert number_of(10**100) == 10**100


@pytest.mark.parametrize(("given", "integer"), [(4, 4), (4.0, 4), ("4", 4), ("4.0", 4), ("4e3", 4000), (-1.0, -1)])
def test_integers_may_come_as_whole_floats(given, integer):
    assert shown(integer_of(given)) == shown(integer)


@pytest.mark.parametrize("given", [0.5, "0.5", math.nan, math.inf, "1e999"])
def test_other_floats_are_no_integers(given):
    assert integer_of(given) is None


def test_a_float_beyond_2_to_the_53_has_been_rounded_and_is_no_integer():
    assert integer_of(2.0**53) == 2**53
    assert integer_of(2.0**53 + 2) is None
    assert integer_of(2**53 + 1) == 2**53 + 1


@pytest.mark.parametrize(
    ("given", "flag"), [(True, True), ("true", True), ("True", True), (" FALSE ", False), ("false", False)]
)
def test_booleans_in_any_case(given, flag):
    assert bool_of(given) is flag


@pytest.mark.parametrize("given", [0, 1, "0", "1", "yes", "no", "on", "", None, [True]])
def test_what_is_no_boolean(given):
    assert bool_of(given) is None


def test_lists_may_come_as_json_whose_entries_are_all_of_the_type():
    assert list_of([1, 2], int) == [1, 2]
    assert list_of((1, 2), int) == (1, 2)
    assert list_of(" [1, 2]", int) == [1, 2]
    assert list_of('["a", "b"]', str) == ["a", "b"]


@pytest.mark.parametrize("given", ["a", "[", "[1, 2", '["a", 1]', "{}", "", 5, None])
def test_what_is_no_list_of_strings(given):
    assert list_of(given, str) is None


def test_brackets_too_deep_for_a_parser_are_text():
    assert list_of("[" * 100_000, str) is None
    assert plain("[" * 100_000) == "[" * 100_000


@pytest.mark.parametrize(
    ("given", "meant"),
    [("True", True), ("false", False), ("None", None), ("null", None), ("0.0", 0.0), ("{}", {}), ("[]", [])],
)
def test_text_in_the_words_of_python_or_json(given, meant):
    assert shown(plain(given)) == shown(meant)


@pytest.mark.parametrize("given", ["auto", "", "{", 0, None, [1]])
def test_everything_else_stays_as_it_is(given):
    assert plain(given) is given


def test_true_is_not_1_and_false_is_not_0():
    assert same(1, 1.0) and same(True, True) and same({}, {})
    assert not same(True, 1) and not same(0, False) and not same(1, 2)


def test_a_value_in_an_error_message_is_short_and_can_be_sent():
    long = ("x" * 10**6, [0] * 9, dict.fromkeys(range(9)), 10**5000, "\ud800", ["x" * 99] * 8)
    for text in map(shorten, long):
        assert len(text) <= 70 and text.encode()
