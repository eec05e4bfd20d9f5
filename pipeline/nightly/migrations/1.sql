-- The first schema: a row for each cell and night, with everything in it.

PRAGMA application_id = 1650881145; -- "bfry": what `file` shows, and how another program's database is told apart

CREATE TABLE nights (
    night TEXT PRIMARY KEY,      -- when it began, in UTC, as 2026-11-22T02:00:00Z
    seconds REAL                 -- how long it took; NULL until it is finished
);

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
    inputs TEXT NOT NULL,        -- JSON: what the result depends on
    verdict TEXT,                -- JSON: docs/verdict.md
    answers BLOB,                -- npz: digests, labels, float_answers and answers
    samples BLOB,                -- npz: seconds of the timed calls of each candidate
    PRIMARY KEY (night, recipe, target, precision)
);

CREATE TABLE findings (
    night TEXT NOT NULL REFERENCES nights,
    position INTEGER NOT NULL,
    recipe TEXT NOT NULL,
    target TEXT NOT NULL,
    precision TEXT NOT NULL,
    kind TEXT NOT NULL,          -- accuracy, float accuracy, latency, size, memory, verdict or failure
    severity TEXT NOT NULL,      -- regression, improvement or notice
    sentence TEXT NOT NULL,
    before REAL,
    after REAL,
    lower REAL,
    upper REAL,
    unit TEXT NOT NULL,          -- of lower and upper: pp, ratio, bytes or nothing
    reference TEXT NOT NULL,     -- the night it is compared with
    since TEXT,
    changed TEXT NOT NULL,       -- JSON: a list of sentences
    PRIMARY KEY (night, position)
);

CREATE TABLE accepted (
    id INTEGER PRIMARY KEY,      -- the last row of a cell is the one that counts
    recipe TEXT NOT NULL,
    target TEXT NOT NULL,
    precision TEXT NOT NULL,
    night TEXT NOT NULL REFERENCES nights,
    at TEXT NOT NULL,
    who TEXT NOT NULL,
    why TEXT NOT NULL
);
