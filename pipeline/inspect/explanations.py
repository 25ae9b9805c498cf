"""What the paper's data were like, and what is publicly known of the cost of differing from it.

`owner/repo#N` is an issue or pull request on GitHub. Where nobody has published a figure, the texts say so.
"""

from ast_core.labels import LabelVocabulary, audioset_labels
from ast_core.published_inputs import AUDIOSET, ESC50, SPEECH_COMMANDS, PublishedInput
from pipeline.prepare.clip import Reason


def published_for(labels: LabelVocabulary) -> PublishedInput | None:
    """By the classes, whatever their order; a tenth of AudioSet's may be missing."""
    if len(set(labels.mids) & set(audioset_labels().mids)) >= 0.9 * len(audioset_labels()):
        return AUDIOSET
    if len(labels) == 50 and {"chirping_birds", "crackling_fire", "vacuum_cleaner"} <= set(labels.names):
        return ESC50
    if len(labels) == 35 and {"marvin", "sheila", "visual"} <= set(labels.names):
        return SPEECH_COMMANDS
    return None


NO_LIST = (
    "What is missing, labelled otherwise or too short is not known without the official list. It is read from "
    "the cache of this machine; --official SPLIT=FILE gives it, and --official eval=eval fetches that of eval."
)

MISSING_MOST = (
    "More than half is missing: this is a trial, an unfinished run or the wrong audio folder, and its mAP says "
    "nothing about the recipe."
)
MISSING_TO_TRAIN = (
    "The paper's own copy lacked 5.4 % of the full set, and its author expects another 1.3 % to make no big "
    "difference unless one class is hit (YuanGongND/whisper-at#13). For a share like this one nobody has published a "
    "figure; it weighs more in the balanced set, where a class has some 60 clips. A fetch of March 2023 got 18,685 of "
    "22,160 balanced and 17,142 of 20,371 eval clips (Hugging Face agkphysics/AudioSet)."
)
MISSING_TO_EVALUATE = (
    "The score is over other clips than the paper's. One study found papers to differ by 5 % by the test clips that "
    "they lack; AudioSet's maintainer saw d′ stay put as more than a tenth went (both in audioset/ontology#8). "
    "Compare d′ too, and compare with the released checkpoint's score on this very split."
)
MISSING_BY_CLASS = (
    "mAP is a plain mean over classes: a rare one that is lost costs as much as the most common one. This is the "
    "'special distribution' that YuanGongND/whisper-at#13 warns of. Hit more than chance would take: {classes}."
)
NOT_IN_LIST = (
    "Clips that the list does not have were not in the paper's set, or have names by which they are not found (a `Y` "
    "before the id, as in qiuqiangkong/audioset_tagging_cnn#57, is seen through)."
)

OTHER_LABELS = (
    "Another label set than the official one. To train on, that may be meant: the published 0.347 of the balanced set "
    "is with the enhanced labels of PSLA (arXiv 2102.01243). An evaluation on other labels compares with no published "
    "mAP."
)
OFFICIAL_LABELS_ON_BALANCED = (
    "The published results of the balanced set (0.347, with averaged weights 0.378) are with the enhanced labels of "
    "PSLA (arXiv 2102.01243): with the official ones expect less. The full set's 0.448 and 0.459 are with official "
    "labels."
)

MARGINALS = (
    "What was lost was not lost by chance: classes have another share in what is learnt and scored. Weighted sampling "
    "evens it out in part, with 46.6 mAP where uniform draws gave 45.1 (k2-fsa/icefall#1727). A minority class that "
    "loses many clips is what makes a copy differ (YuanGongND/whisper-at#13)."
)

SHORT = (
    "What a clip lacks is padded, and the sound that gave it its label may be in what it lacks. Padding does little "
    "harm in small measure (26 frames of 1024 in every 10 s clip: YuanGongND/ssast#33) and much in large: a model of "
    "1024 frames fails on clips of 1 s (YuanGongND/ast#60)."
)
CUT = (
    "What is beyond the recipe's {frames} frames is cut, and labels of what comes there become wrong. Such files are "
    "not the listed sections: cut them by their start and end, or set --input_tdim."
)

RUN_AGAIN = "The preparation, run again, may still get what failed for reasons that pass."
FAILED = {
    Reason.THROTTLED: "`throttled`: lower --fetches-per-hour, or give more --addresses.",
    Reason.SETUP: "`setup`: update yt-dlp first.",
    Reason.MISSING_FILE: "`missing_file`: another --audio-dir adds what this one lacks.",
    Reason.UNAVAILABLE: "`unavailable`: gone from YouTube. Older copies may have it, such as agkphysics/AudioSet or "
    "confit/audioset-16khz-wds (1,912,024 clips) on Hugging Face.",
    Reason.SILENT: "`silent`: the original dropped no such clip; --keep-silent prepares it.",
}

OTHER_NORM = (
    "The audio differs from the paper's. Copies whose own figures were (-3.38, 3.89) and (-3.54, 3.42) trained to "
    "0.433 mAP where the authors' log reads 0.449 (YuanGongND/ast#85, #108). Their author takes the figures for a "
    "sign of other audio and not for the cause: in a test of his, training was not sensitive to them "
    "(YuanGongND/ast#5). With AudioSet weights keep the published two; from ImageNet weights take the data's own, for "
    "evaluation as well."
)
FORMAT_FAULT = (
    "So far off, it is the scale or the format and not the choice of clips. Such faults look like a bad model: 32-bit "
    "float WAV read as 16-bit gave 0.018 mAP (RicherMans/PSL#3), another converter sank "
    "RetroCirce/HTS-Audio-Transformer#3."
)
LOWER_SPREAD = (
    "A smaller spread and a higher mean have their quiet parts lifted: lossy coding at a low rate, dither, compressed "
    "loudness."
)
LARGER_SPREAD = "A larger spread has more bins near the floor: audio that was upsampled, low-passed or gated."

NOT_FINITE = (
    "One such clip makes the loss NaN, and with it every weight of the model; it spoils the norm as well. The audio "
    "is damaged: delete the shards with these clips, and leave them out of the list."
)

SILENCE = (
    "A silent clip teaches its labels to silence, and in an evaluation no model can find them. Digital silence is at "
    "-15.9, far below sound, so it lowers the mean and widens the spread. Padded files, empty sound tracks and failed "
    "conversions look like this. What it costs, nobody has published."
)

DUPLICATES = (
    "Such audio is drawn more often than its weight says; where the labels differ, it is taught two truths. One video "
    "is uploaded under several ids (hkchengrex/MMAudio#50); if there are many, look at how files were matched to ids. "
    "Only audio that is equal to the bit is found."
)
LEAKAGE = (
    "Trained on one and scored on the other, the model is asked what it has learnt by heart: the score is too high, "
    "and compares with no published one. AudioSet's lists share no video, but one video is uploaded under several ids "
    "(hkchengrex/MMAudio#50). Take these clips out of the training list."
)
COUNTED_TWICE = "Used together, these clips count twice, and weights are computed as if each were another clip."

CLIPPING = (
    "Peaks that resampling lifts beyond full scale are cut. sox warns of it; the authors of AST and PANNs take it for "
    "harmless (YuanGongND/ast#108, qiuqiangkong/audioset_tagging_cnn#4). This is more than resampling does by itself: "
    "listen to the worst clips."
)
CLIPPED_THROUGHOUT = (
    "This is no loud music but a wrong scale: float files with the values of 16-bit integers become square waves. "
    "Such faults gave 0.018 mAP (RicherMans/PSL#3). Convert the files to 16-bit PCM."
)

STALE_INDEX = (
    "Training takes its clips and labels from the index: what it says of another clip is learnt as the truth. Runs "
    "that were stopped while they published, and files copied one by one, look like this. Run the preparation again: "
    "it reads the shards back, and writes index and dataset.json anew."
)
STALE_WEIGHTS = (
    "These weights were computed for other clips. 'A mistake in generating the sample weight could cause a pretty "
    "large performance drop', and they must be made anew whenever clips come or go (YuanGongND/ast#108). "
    "jobs/train.py computes its own at each start and does not suffer; whoever reads sample_weight does. Run the "
    "preparation again: it writes them anew."
)

OTHER_ORDER = (
    "Published AudioSet checkpoints score classes in the order of class_labels_indices.csv (README of "
    "YuanGongND/ast): here each score would be taken for another class, and mAP falls to about chance. A model "
    "trained here from ImageNet weights is sound, but only with this labels.csv. Prepare the data anew without "
    "--labels."
)
OTHER_CLASSES = (
    "mAP is a mean over classes, and classes differ widely in theirs (audioset/ontology#8): over others it is another "
    "figure. Published checkpoints do not fit this vocabulary."
)
OTHER_FEATURES = (
    "Weights and published norms are for the recipes' features; 'Kaldi-compatible' alone settles neither scale nor "
    "dither (pytorch/audio#400). Prepare the data anew."
)
