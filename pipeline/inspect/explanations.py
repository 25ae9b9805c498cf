"""Explanations of the doctor's findings: the paper's data, and published evidence of what differences cost.

`owner/repo#N` is an issue or pull request on GitHub. If nobody has published a figure, the text says so.
"""

from ast_core.features import KALDI128, FeatureSettings
from ast_core.labels import LabelVocabulary, audioset_labels
from ast_core.published_inputs import AUDIOSET, ESC50, SPEECH_COMMANDS, PublishedInput
from pipeline.prepare.clip import Reason


def published_for(labels: LabelVocabulary, features: FeatureSettings = KALDI128) -> PublishedInput | None:
    """The published input with these features and the same classes in any order; None if there is none.

    AudioSet may lack a tenth.
    """
    if features != KALDI128:
        return None
    if len(set(labels.mids) & set(audioset_labels().mids)) >= 0.9 * len(audioset_labels()):
        return AUDIOSET
    if len(labels) == 50 and {"chirping_birds", "crackling_fire", "vacuum_cleaner"} <= set(labels.names):
        return ESC50
    if len(labels) == 35 and {"marvin", "sheila", "visual"} <= set(labels.names):
        return SPEECH_COMMANDS
    return None


NO_LIST = (
    "Without the official list, missing clips, other labels and short clips cannot be found. The list is read from "
    "the cache of this machine; --official SPLIT=FILE gives it, and --official eval=eval fetches that of eval."
)

MISSING_MOST = (
    "More than half is missing: this is a trial, an unfinished run or the wrong audio folder, and its mAP says "
    "nothing about the recipe."
)
MISSING_TO_TRAIN = (
    "The paper's own copy lacked 5.4 % of the full set, and its author expects no big difference from another 1.3 % "
    "unless one class loses most (YuanGongND/whisper-at#13). For a share like this one nobody has published a figure. "
    "It matters more in the balanced set, where a class has about 60 clips. A fetch of March 2023 got 18,685 of "
    "22,160 balanced and 17,142 of 20,371 eval clips (Hugging Face agkphysics/AudioSet)."
)
MISSING_TO_EVALUATE = (
    "The metrics are computed over other clips than the paper's. One study found that papers differ by 5 % because of "
    "missing test clips; AudioSet's maintainer saw no change of d′ when more than a tenth was lost (both in "
    "audioset/ontology#8). Compare d′ too, and compare with the released checkpoint on this very split."
)
MISSING_BY_CLASS = (
    "mAP is a plain mean over classes: losing a rare class costs as much as losing the most common one. "
    "YuanGongND/whisper-at#13 warns of this 'special distribution'. These classes lost more than by chance: {classes}."
)
NOT_IN_LIST = (
    "Clips that are not in the list were not in the paper's set, or have names that are not recognised (a `Y` before "
    "the id, as in qiuqiangkong/audioset_tagging_cnn#57, is recognised)."
)

OTHER_LABELS = (
    "The labels are not the official ones. For training this may be intended: the published 0.347 of the balanced set "
    "uses the enhanced labels of PSLA (arXiv 2102.01243). An evaluation on other labels cannot be compared with any "
    "published mAP."
)
OFFICIAL_LABELS_ON_BALANCED = (
    "The published results of the balanced set (0.347, an ensemble 0.378) use the enhanced labels of PSLA "
    "(arXiv 2102.01243): expect less with the official ones. The full set's 0.448 and 0.459 use official labels."
)

MARGINALS = (
    "Clips were not lost at random: the classes' shares of training and evaluation changed. Weighted sampling "
    "corrects this in part: it gave 46.6 mAP, uniform sampling 45.1 (k2-fsa/icefall#1727). Copies differ most if a "
    "minority class loses many clips (YuanGongND/whisper-at#13)."
)

SHORT = (
    "Short clips are padded, and the sound that their label describes may be in the missing part. A little padding "
    "does little harm (26 frames of 1024 in every 10 s clip: YuanGongND/ssast#33), much padding does: a model of "
    "1024 frames fails on clips of 1 s (YuanGongND/ast#60)."
)
CUT = (
    "Clips are cut after the recipe's {frames} frames, and labels of sounds after the cut become wrong. Such files "
    "are not the listed sections: cut them by their start and end, or set --input_tdim."
)

RUN_AGAIN = "Run the preparation again: it may still get the clips that failed for temporary reasons."
FAILED = {
    Reason.THROTTLED: "`throttled`: lower --fetches-per-hour, or give more --addresses.",
    Reason.SETUP: "`setup`: update yt-dlp first.",
    Reason.MISSING_FILE: "`missing_file`: another --audio-dir adds what this one lacks.",
    Reason.UNAVAILABLE: "`unavailable`: gone from YouTube. Older copies may have it, such as agkphysics/AudioSet or "
    "confit/audioset-16khz-wds (1,912,024 clips) on Hugging Face.",
    Reason.SILENT: "`silent`: the reference implementation keeps such clips; --keep-silent prepares them.",
}

OTHER_NORM = (
    "The audio differs from the paper's. With a copy whose norm was (-3.38, 3.89), or (-3.54, 3.42), others reached "
    "0.434 mAP, the authors' log 0.449 (YuanGongND/ast#85, #108). The AST author sees the norm as a sign of other "
    "audio, not as the cause: in his test training was not sensitive to it (YuanGongND/ast#5). With AudioSet weights "
    "keep the published norm; from ImageNet weights use the data's own, also for evaluation."
)
FORMAT_FAULT = (
    "So large a difference comes from the scale or the format, not from the choice of clips. Such faults look like a "
    "bad model: 32-bit float WAV read as 16-bit gave 0.018 mAP (RicherMans/PSL#3); for another faulty converter see "
    "RetroCirce/HTS-Audio-Transformer#3."
)
LOWER_SPREAD = (
    "A smaller spread and a higher mean come from raised quiet parts: lossy coding at a low rate, dither, or dynamic "
    "range compression."
)
LARGER_SPREAD = "A larger spread comes from more bins near the floor: audio that was upsampled, low-passed or gated."

NOT_FINITE = (
    "One such clip makes the loss, and then every weight of the model, NaN. It also makes the norm useless. The audio "
    "is damaged: delete the shards with these clips, and remove the clips from the list."
)

SILENCE = (
    "From a silent clip the model learns that silence has its labels, and in an evaluation no model can find them. "
    "Digital silence is at -15.9, far below sound, so it lowers the mean and widens the spread. Padded files, empty "
    "sound tracks and failed conversions look like this. Nobody has published what it costs."
)

DUPLICATES = (
    "Such audio is drawn more often than its weight says. If the labels differ, they contradict each other. A video "
    "may be uploaded under several ids (hkchengrex/MMAudio#50); if there are many copies, check how files were matched "
    "to ids. Only audio that is equal to the bit is found."
)
LEAKAGE = (
    "A model that is trained on one of these splits and evaluated on the other has seen these clips: the metrics are "
    "too high and cannot be compared with published ones. AudioSet's lists share no video, but a video may be uploaded "
    "under several ids (hkchengrex/MMAudio#50). Remove these clips from the training list."
)
SAME_IDS = (
    "Equal clip ids with different sound are probably different recordings, as 001 is in many data sets: this costs "
    "nothing. If they are one recording that was coded again, remove it from one of the two lists."
)
NEARLY_EQUAL = (
    "Listen to these pairs. They fluctuate in the same way, as copies of one recording do that were coded again, cut "
    "elsewhere or made louder. The metrics of the smaller split are then too high: remove the copies from the training "
    "list. Equal audio is reported as leakage. OpenMIC looked for such clips by embeddings (cosmir/openmic-2018#24); "
    "for AudioSet nobody has published how many there are."
)
COUNTED_TWICE = "If both splits are used together, these clips count twice, also in the sample weights."

CLIPPING = (
    "Peaks that resampling raises beyond full scale are clipped. sox warns of it; the authors of AST and PANNs "
    "consider it harmless (YuanGongND/ast#108, qiuqiangkong/audioset_tagging_cnn#4). This is more than resampling "
    "alone causes: listen to the worst clips."
)
CLIPPED_THROUGHOUT = (
    "The cause is a wrong scale, not loud music: float files with the values of 16-bit integers become square waves. "
    "Such faults gave 0.018 mAP (RicherMans/PSL#3). Convert the files to 16-bit PCM."
)

STALE_INDEX = (
    "Training takes its clips and labels from the index, so a wrong row gives a clip the labels of another one. This "
    "happens if a run was stopped while it published, or if files were copied one by one. Run the preparation again: "
    "it reads the shards and writes index and dataset.json again."
)
STALE_WEIGHTS = (
    "These weights were computed for other clips. 'A mistake in generating the sample weight could cause a pretty "
    "large performance drop', and they must be computed again whenever the clips change (YuanGongND/ast#108). "
    "jobs/train.py computes its own at each start and is not affected; other readers of sample_weight are. Run the "
    "preparation again: it writes the weights again."
)

OTHER_ORDER = (
    "Published AudioSet checkpoints score classes in the order of class_labels_indices.csv (README of "
    "YuanGongND/ast): here each score would count for another class, and mAP would fall to about chance. A model "
    "trained here from ImageNet weights is valid, but only with this labels.csv. Prepare the data again without "
    "--labels."
)
OTHER_CLASSES = (
    "mAP is a mean over classes, and classes differ widely in AP (audioset/ontology#8), so mAP over other classes "
    "cannot be compared. Published checkpoints do not fit this vocabulary."
)
OTHER_FEATURES = (
    "Published weights and norms are for kaldi128, and so is each recipe that does not set the key features. Without "
    "a published norm the recipe needs norm_stats data, or the mean and std of these data."
)
