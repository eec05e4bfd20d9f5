-- What nights have in common is kept once: the large columns of `results` point at rows of `blobs` by content.

CREATE TABLE blobs (
    id INTEGER PRIMARY KEY,
    sha256 TEXT NOT NULL UNIQUE, -- of the unpacked content
    size INTEGER NOT NULL,       -- of the unpacked content, in bytes
    content BLOB NOT NULL        -- deflated by zlib where that is smaller than `size`, else as it is
);

CREATE TEMP TABLE parts AS SELECT rowid AS result,
    CAST(json_remove(inputs, '$.packages') AS BLOB) AS inputs,
    CAST(json_extract(inputs, '$.packages') AS BLOB) AS packages,
    CAST(verdict AS BLOB) AS verdict,
    npz_part(answers, 'digests,labels') AS truth,
    npz_part(answers, 'float_answers') AS float_answers,
    npz_part(answers, 'answers') AS answers,
    npz_part(samples, '') AS samples
    FROM results;

INSERT OR IGNORE INTO blobs (sha256, size, content) SELECT sha256(part), length(part), deflated(part) FROM (
    SELECT inputs AS part FROM parts
    UNION ALL SELECT packages FROM parts
    UNION ALL SELECT verdict FROM parts
    UNION ALL SELECT truth FROM parts
    UNION ALL SELECT float_answers FROM parts
    UNION ALL SELECT answers FROM parts
    UNION ALL SELECT samples FROM parts
) WHERE part IS NOT NULL;

ALTER TABLE results RENAME TO old;

CREATE TABLE results (
    night TEXT NOT NULL REFERENCES nights,
    recipe TEXT NOT NULL,
    target TEXT NOT NULL,
    precision TEXT NOT NULL,
    status TEXT NOT NULL,        -- measured, reused or failed
    outcome TEXT NOT NULL,       -- pass, fail, undecided, unmeasured or failed
    kind TEXT NOT NULL,          -- of the node that measured it
    key TEXT NOT NULL,           -- equal keys: nothing that the answers depend on differs
    headline TEXT NOT NULL,      -- the verdict's, or the error
    percent REAL,                -- the judged metric of the artifact
    float_percent REAL,          -- and of the float model, on the same images
    drop_pp REAL,                -- float_percent - percent, for most metrics
    drop_lower_pp REAL,
    drop_upper_pp REAL,
    images INTEGER,
    latency_ms REAL,             -- median of a call of the artifact
    baseline_ms REAL,            -- and of the float model that it is compared with in the same night
    ratio REAL,                  -- the artifact's time over the baseline's
    ratio_lower REAL,
    ratio_upper REAL,
    file_bytes INTEGER,
    memory_bytes INTEGER,
    seconds REAL NOT NULL,       -- of work on this cell in this night
    attempts INTEGER NOT NULL,
    error TEXT,
    error_kind TEXT,             -- machine or ours
    measured_at TEXT,
    inputs INTEGER NOT NULL REFERENCES blobs, -- JSON: what the result depends on, but for:
    packages INTEGER NOT NULL REFERENCES blobs, -- JSON: every installed package and its version
    verdict INTEGER REFERENCES blobs, -- JSON: docs/verdict.md
    truth INTEGER REFERENCES blobs, -- npz: digests and labels of the images
    float_answers INTEGER REFERENCES blobs, -- npz: what the float model answers for each
    answers INTEGER REFERENCES blobs, -- npz: what the artifact answers for each
    samples INTEGER REFERENCES blobs, -- npz: seconds of the timed calls of each candidate
    PRIMARY KEY (night, recipe, target, precision)
);

INSERT INTO results SELECT night, recipe, target, precision, status, outcome, kind, key, headline, percent,
    float_percent, drop_pp, drop_lower_pp, drop_upper_pp, images, latency_ms, baseline_ms, ratio, ratio_lower,
    ratio_upper, file_bytes, memory_bytes, seconds, attempts, error, error_kind, measured_at,
    (SELECT id FROM blobs WHERE blobs.sha256 = sha256(parts.inputs)),
    (SELECT id FROM blobs WHERE blobs.sha256 = sha256(parts.packages)),
    (SELECT id FROM blobs WHERE blobs.sha256 = sha256(parts.verdict)),
    (SELECT id FROM blobs WHERE blobs.sha256 = sha256(parts.truth)),
    (SELECT id FROM blobs WHERE blobs.sha256 = sha256(parts.float_answers)),
    (SELECT id FROM blobs WHERE blobs.sha256 = sha256(parts.answers)),
    (SELECT id FROM blobs WHERE blobs.sha256 = sha256(parts.samples))
    FROM old JOIN parts ON parts.result = old.rowid ORDER BY old.rowid;

DROP TABLE parts;
DROP TABLE old;

CREATE INDEX results_of_a_cell ON results (recipe, target, precision, night);
CREATE INDEX accepted_of_a_cell ON accepted (recipe, target, precision);
