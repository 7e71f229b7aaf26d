"""What each figure of a report means, for a reader who meets it for the first time."""

from __future__ import annotations

from quantkit.report.words import PER_CENT

GLOSSARY: dict[str, str] = {
    "Size, bits per weight": (
        "Bytes of all tensors of the text model, and the bits that one of its parameters takes on average, scales "
        "included. Sizes are decimal: 1 GB is 1,000,000,000 bytes."
    ),
    "Perplexity": (
        "How surprised the model is by the text: with a perplexity of 8 it is as unsure of the next token as if it had to "
        "guess among 8 equally likely ones. Lower is better. It depends on the text and on the window, so compare it only "
        "within this report."
    ),
    "Ratio": (
        "The artifact's perplexity divided by the reference's on the same text. 1 means that nothing was lost; 1.01 is a "
        "loss of one per cent. It can fall below 1 by chance, since errors also help now and then."
    ),
    "KL divergence (KLD)": (
        "How far the artifact's probabilities for the next token are from the reference's, at every position, in nats. 0 "
        "means the same distribution. Errors cannot cancel each other here, so it shows damage that perplexity hides. The "
        "mean says how far off the artifact usually is; the percentiles and the largest value say how bad its rare "
        "failures are: 99 of 100 positions stay below the 99 % figure."
    ),
    "Top-1 agreement": (
        "The share of positions where artifact and reference find the same token most likely: how often greedy decoding "
        "would go on with the same word."
    ),
    "Shift of the right token": (
        "By how much the probability of the token that really follows has changed, on average: negative means that the "
        "artifact is less sure of what is right. The root mean square says how much it moves either way."
    ),
    "Router agreement": (
        "In a mixture of experts, a router sends each token to one of the experts of a layer. This is the share of tokens "
        "that go to the same expert as in the reference. A token that goes elsewhere meets different weights, however "
        "exactly they are stored."
    ),
    "Weight error": (
        "How far the stored weights of a layer are from the original ones: the root of the summed squared errors over the "
        "summed squares. It comes from the ledger of the conversion, not from the text."
    ),
    "Expert coverage": (
        "How many tokens of the calibration text each expert received. Experts with few tokens were calibrated on little, "
        "and their errors may not show on this text either."
    ),
    f"{PER_CENT} interval": (
        "What the figure could have been with other text of the same sort: windows of text are drawn again and again from "
        f"those measured, and {PER_CENT} of the results fall into the interval. Differences between two artifacts are computed "
        "on the same windows, which makes them sharper than the figures themselves. Intervals are not widened for the "
        "number of comparisons; what is called significant, or more than noise, has passed Holm's correction for all pairs of "
        "artifacts, so that in 19 of 20 reports none of it is chance."
    ),
}
