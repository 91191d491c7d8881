"""Each known way of getting this model silently wrong, and the test that catches it.

The numbers are those that docstrings of the tests name. The list is checked: a test that is renamed or deleted is
missed here.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LM, ENCODER, SHARED = "perception_lm", "perception_encoder", "perception"

TRAPS: dict[int, tuple[str, str, str]] = {
    1: ("rotary order of q and k", f"{LM}/test_layouts.py", "test_trap_1_a_wrong_order_of_rows_shows"),
    2: ("k turned with q's heads", f"{LM}/test_layouts.py", "test_trap_2_keys_are_turned_by_their_own_heads"),
    3: ("rope scaling", f"{LM}/test_layouts.py", "test_trap_3_a_wrong_rope_scaling_shows"),
    4: ("pooling before the MLP", f"{LM}/test_projector.py", "test_pooling_equals_the_formula"),
    5: ("tanh GELU", f"{LM}/test_projector.py", "test_pooling_equals_the_formula"),
    6: ("class token kept", f"{LM}/test_model.py", "test_golden_stages"),
    7: ("a layer or a norm too many", f"{LM}/test_layouts.py", "test_trap_7_key_counts_of_the_published_models"),
    8: ("class token's rotary row", f"{LM}/test_layouts.py", "test_trap_8_the_class_token_comes_first"),
    9: (
        "timm's reference grid and pool",
        f"{LM}/test_layouts.py",
        "test_trap_9_a_tower_that_timm_would_build_otherwise_is_refused",
    ),
    10: ("LayerScale missing", f"{LM}/test_layouts.py", "test_trap_10_every_gamma_is_needed"),
    11: ("tiles out of order", f"{SHARED}/test_tiling.py", "test_tiles_lie_row_by_row_after_the_thumbnail"),
    12: ("ties between grids", f"{SHARED}/test_tiling.py", "test_published_grids"),
    13: ("nearest shape, both branches", f"{SHARED}/test_tiling.py", "test_known_grids"),
    14: ("floor of a float product", f"{SHARED}/test_tiling.py", "test_published_grids"),
    15: ("resampling of frames", f"{LM}/test_processor.py", "test_published_prompts_and_pixels"),
    16: ("mean and std", f"{LM}/test_processor.py", "test_published_prompts_and_pixels"),
    17: ("frames of a video", f"{LM}/test_processor.py", "test_frames_of_a_clip"),
    18: ("the prompt's layout", f"{LM}/test_chat.py", "test_published_prompts"),
    19: ("the special ids", f"{LM}/test_tokenizer.py", "test_special_ids"),
    20: ("special ids from user text", f"{LM}/test_tokenizer.py", "test_special_strings_of_a_user_are_text"),
    21: ("stop tokens, from the first on", f"{LM}/test_generation.py", "test_first_token_may_be_the_last"),
    22: ("causal mask of a longer cache", f"{LM}/test_cache.py", "test_pieces_equal_the_whole"),
    23: ("features of mixed batches", f"{LM}/test_model.py", "test_rows_side_by_side"),
    24: ("slots and features differ", f"{LM}/test_model.py", "test_slots_and_media_must_agree"),
    25: ("which tokens are learned", f"{LM}/test_model.py", "test_labels_are_the_tokens_themselves"),
    26: ("a sample without labels", f"{LM}/test_model.py", "test_nothing_to_learn_is_no_loss"),
    27: ("the warm-up format", f"{LM}/test_chat.py", "test_warm_up_form"),
    28: ("tied weights", f"{LM}/test_layouts.py", "test_trap_28_a_tied_matrix_is_one"),
    29: ("norms and angles in half precision", f"{LM}/test_decoder.py", "test_norm_multiplies_in_float32"),
    30: ("format of boxes", f"{LM}/test_regions.py", "test_published_texts"),
    31: ("reading boxes", f"{LM}/test_regions.py", "test_published_boxes"),
    32: ("the context's limit", f"{LM}/test_processor.py", "test_refused_before_anything_is_decoded"),
    33: ("padding that is a real id", f"{LM}/test_processor.py", "test_padding_is_known_by_its_place"),
    34: ("first learning rate, decay groups", f"{LM}/test_schedule.py", "test_published_factors"),
    35: ("keys and boxes of rows", f"{LM}/test_regions.py", "test_published_texts"),
    36: ("spaces taken out by decoding", f"{LM}/test_tokenizer.py", "test_any_text_comes_back"),
    37: ("a stale cache", f"{LM}/test_cache.py", "test_a_model_keeps_nothing_itself"),
    38: ("stretched positions", f"{ENCODER}/test_mutations.py", "test_mistake_is_seen"),
}


@pytest.mark.parametrize("number", TRAPS)
def test_trap_has_its_test(number: int) -> None:
    _, file, name = TRAPS[number]
    functions = {
        node.name: ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse((TESTS / file).read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert name in functions


def test_none_is_left_out() -> None:
    assert sorted(TRAPS) == list(range(1, 39))
