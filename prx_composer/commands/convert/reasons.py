"""Why a sample is left out: the names that are counted, stored and reported, and what they mean."""

from prx_composer.data.decoding import IMAGE_REASONS

REASONS = {
    "damaged_input": "a file ends early or is broken: what was readable is kept (counted once per file, row group or shard)",
    "unreadable_record": "a line, JSON member, row or value that is not what it should be",
    "same_name_twice": "members of a tar with the same name: which image belongs to which text is not known",
    "several_images": "a sample with several images: --image says which is meant",
    "no_image": "no image with the record, or the file it names is not there",
    "url": "the image is an address, and nothing is downloaded: img2dataset does, and makes tars for --source webdataset",
    "outside_input": "the record names a file outside of the input folder: it is not opened",
    "file_too_large": "an encoded image or text above 256 MiB: it is not read",
    **IMAGE_REASONS,
    "no_caption": "none of the captions is there (missing, NaN, empty or only spaces)",
    "caption_not_utf8": "a caption that is not text in UTF-8",
    "metadata": "a metadata column that is missing or not of its type",
    "caption_length": "the shortest or longest caption is outside of --caption-chars",
    "min_side": "the shorter side is below --min-side",
    "max_aspect": "wider or taller than --max-aspect",
    "single_colour": "all pixels are the same colour, within 2 of 255",
    "where": "--where is false",
    "where_failed": "--where cannot be evaluated on this sample, such as a number compared with a missing value",
    "duplicate": "the same bytes as an earlier sample",
    "near_duplicate": "a perceptual hash within --distance bits of an earlier sample that is kept",
}
