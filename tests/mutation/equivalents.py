"""Mutants that compute the same for every input, each with the reason why.

The rows that they change allow less than they could; what else is changed costs time alone.
"""

_ZEROS = "what is made is zero whatever is read, and a sum of zeros is zero"
_COUNTS = "a place is a count of the borders below, and counts over chunks of the borders add up"
_NOISE = "x * noise is linear in x, and ranks that hold terms of one tensor draw one noise"
_FILL = "the result is one value everywhere: linear in it, and nothing else is read"
_UNREAD = "only the dtype of the second operand is read"
_WHOLE = "what runs any op on whole operands draws alike, at the whole's cost"
_REASONS = {
    "new_zeros.default: b1 not whole": _ZEROS,
    "new_zeros.default: linear": _ZEROS,
    "bucketize.Tensor: k not whole": _COUNTS,
    "dropout.default: linear": _NOISE,
    "feature_dropout.default: linear": _NOISE,
    "fill.Tensor: linear": _FILL,
    "type_as.default: linear in all": _UNREAD,
}
EQUIVALENT = {
    **{("rule", name): reason for name, reason in _REASONS.items()},
    ("random", "Sites._exact: rule.exact or exact_part -> exact_part"): _WHOLE,
}
