"""The tables of the database, and how those of earlier versions become like them.

A change of the schema is one more script in MIGRATIONS and the same change in SCHEMA; a test
compares the two.
"""

SCHEMA = """
    CREATE TABLE tasks (
        number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of submission
        task_id TEXT NOT NULL UNIQUE,
        client_key TEXT UNIQUE,                    -- of an idempotent submit
        priority INTEGER NOT NULL,
        status TEXT NOT NULL,
        attempt INTEGER NOT NULL DEFAULT 0,        -- number of the latest claim
        params TEXT,                               -- JSON; NULL once the task is gone
        created_at REAL NOT NULL,                  -- unix seconds, like the two that follow
        started_at REAL,
        ended_at REAL,
        fetched_at REAL,                           -- seconds of the KeepClock: all images were sent
        measured TEXT,                             -- JSON: seconds of each phase
        image_bytes INTEGER,                       -- sum of image_sizes
        error_code TEXT,
        error TEXT,
        gone TEXT,                                 -- why there is nothing to see any more
        gone_at REAL,                              -- seconds of the KeepClock
        image_sizes TEXT,                          -- JSON: bytes of each of its image files
        fetched TEXT,                              -- JSON: which were sent, to be removed
        kept_since REAL,                           -- when it ended, in seconds of the KeepClock
        interruptions INTEGER NOT NULL DEFAULT 0,  -- claims that died
        sequence INTEGER NOT NULL DEFAULT 0,       -- see policy.key
        group_sequence INTEGER NOT NULL DEFAULT 0,
        last_image INTEGER,                        -- index of the image after which to cancel it
        owner TEXT NOT NULL DEFAULT '',            -- name of its client
        end_user TEXT NOT NULL DEFAULT '',         -- user of that client
        weight REAL NOT NULL DEFAULT 1,            -- of its client
        start_by REAL,                             -- seconds of the KeepClock; NULL: any time
        machine TEXT NOT NULL DEFAULT 'local',     -- of its latest claim
        kept INTEGER NOT NULL DEFAULT 0,           -- pinned by its client
        retried_after INTEGER NOT NULL DEFAULT 0   -- claims until it was tried again
    );
    CREATE INDEX tasks_by_keeping ON tasks (gone, status, kept_since);
    CREATE INDEX kept_tasks ON tasks (owner) WHERE kept;
    CREATE TABLE callbacks (                       -- to be made when the task has ended
        task_id TEXT PRIMARY KEY,
        url TEXT NOT NULL,
        tries INTEGER NOT NULL DEFAULT 0,          -- that failed
        due_at REAL NOT NULL DEFAULT 0             -- not before
    );
    CREATE TABLE samples (                         -- the latest measured works
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        work TEXT NOT NULL,                        -- JSON
        measured TEXT NOT NULL,                    -- JSON
        model TEXT,                                -- the timing key
        machine TEXT NOT NULL DEFAULT 'local'
    );
    CREATE INDEX samples_by_machine ON samples (machine, model, number);
    CREATE TABLE loads (                           -- seconds of loading
        model TEXT NOT NULL,
        seconds REAL NOT NULL,
        machine TEXT NOT NULL DEFAULT 'local',
        PRIMARY KEY (machine, model)
    );
    CREATE TABLE speeds (                          -- measured, for first forecasts
        machine TEXT PRIMARY KEY,
        flop_per_s REAL NOT NULL,
        by_product TEXT NOT NULL DEFAULT '{}',     -- JSON
        mlx TEXT NOT NULL DEFAULT ''               -- its version
    );
    CREATE TABLE outcomes (                        -- what was forecast at submit, and what came
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        priority INTEGER NOT NULL,
        forecast_s REAL NOT NULL,
        p90_s REAL NOT NULL,
        actual_s REAL NOT NULL,
        model TEXT NOT NULL DEFAULT '',            -- '': not known
        machine TEXT NOT NULL DEFAULT '',
        ended_at REAL NOT NULL DEFAULT 0           -- unix seconds
    );
    CREATE TABLE usage (                           -- of the GPU, by client
        client TEXT PRIMARY KEY,
        gpu_s REAL NOT NULL,                       -- in all
        day INTEGER NOT NULL,                      -- the latest, in days since 1970 (UTC)
        day_gpu_s REAL NOT NULL                    -- on that day
    );
    CREATE TABLE busy (                            -- GPU seconds of the latest hours
        hour INTEGER NOT NULL,                     -- since 1970
        machine TEXT NOT NULL,
        gpu_s REAL NOT NULL,
        PRIMARY KEY (hour, machine)
    );
    CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL);  -- see state_store.py
"""
"""Of a new database."""

MIGRATIONS = (
    """
    CREATE TABLE tasks (
        number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of submission
        task_id TEXT NOT NULL UNIQUE,
        client_key TEXT UNIQUE,                    -- of an idempotent submit
        urgent INTEGER NOT NULL,
        status TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,       -- claims that were not released
        params TEXT,                               -- JSON; NULL once the task is gone
        created_at REAL NOT NULL,                  -- unix seconds, like all that follow
        started_at REAL,
        ended_at REAL,
        fetched_at REAL,                           -- when its image was sent, to be removed
        measured TEXT,                             -- JSON: seconds of each phase
        image_bytes INTEGER,                       -- size of its image file
        error_code TEXT,
        error TEXT,
        gone TEXT                                  -- why there is nothing to see any more
    );
    CREATE INDEX tasks_by_end ON tasks (gone, status, ended_at);
    CREATE TABLE samples (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        work TEXT NOT NULL,                        -- JSON
        measured TEXT NOT NULL                     -- JSON
    );
    CREATE TABLE loads (model TEXT PRIMARY KEY, seconds REAL NOT NULL);
    """,
    """
    ALTER TABLE samples ADD COLUMN model TEXT;     -- the timing key
    UPDATE samples SET model = json_extract(work, '$.model');
    CREATE INDEX samples_by_model ON samples (model, number);
    ALTER TABLE tasks ADD COLUMN gone_at REAL;     -- NULL: as early as it ended
    CREATE TABLE outcomes (                        -- what was forecast at submit, and what came
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        urgent INTEGER NOT NULL,
        forecast_s REAL NOT NULL,
        p90_s REAL NOT NULL,
        actual_s REAL NOT NULL
    );
    """,
    """
    ALTER TABLE tasks ADD COLUMN image_sizes TEXT; -- JSON: bytes of each of its image files
    ALTER TABLE tasks ADD COLUMN fetched TEXT;     -- JSON: which were sent, to be removed
    """,
    """
    CREATE TABLE callbacks (                       -- to be made when the task has ended
        task_id TEXT PRIMARY KEY,
        url TEXT NOT NULL,
        tries INTEGER NOT NULL DEFAULT 0,          -- that failed
        due_at REAL NOT NULL DEFAULT 0             -- not before
    );
    """,
    """
    ALTER TABLE tasks ADD COLUMN kept_since REAL;  -- when it ended, in seconds of the KeepClock
    UPDATE tasks SET kept_since = ended_at;        -- (like fetched_at, gone_at and due_at)
    DROP INDEX tasks_by_end;
    CREATE INDEX tasks_by_keeping ON tasks (gone, status, kept_since);
    CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL);
    """,
    """
    ALTER TABLE tasks RENAME COLUMN urgent TO priority;
    ALTER TABLE outcomes RENAME COLUMN urgent TO priority;
    ALTER TABLE tasks RENAME COLUMN attempts TO attempt;  -- number of the latest claim
    ALTER TABLE tasks ADD COLUMN interruptions INTEGER NOT NULL DEFAULT 0;  -- claims that died
    UPDATE tasks SET interruptions = attempt - (status = 'running')
        WHERE status IN ('waiting', 'running');
    ALTER TABLE tasks ADD COLUMN sequence INTEGER NOT NULL DEFAULT 0;       -- see policy.key
    ALTER TABLE tasks ADD COLUMN group_sequence INTEGER NOT NULL DEFAULT 0;
    UPDATE tasks SET sequence = number, group_sequence = number;
    ALTER TABLE tasks ADD COLUMN last_image INTEGER;  -- index of the image after which to cancel it
    UPDATE tasks SET image_sizes = '[' || image_bytes || ']'
        WHERE image_sizes IS NULL AND image_bytes IS NOT NULL;
    """,
    """
    ALTER TABLE tasks ADD COLUMN owner TEXT NOT NULL DEFAULT '';    -- name of its client
    ALTER TABLE tasks ADD COLUMN end_user TEXT NOT NULL DEFAULT ''; -- user of that client
    """,
    """
    ALTER TABLE tasks ADD COLUMN weight REAL NOT NULL DEFAULT 1;    -- of its client
    """,
    """
    CREATE TABLE usage (                           -- of the GPU, by client
        client TEXT PRIMARY KEY,
        gpu_s REAL NOT NULL,                       -- in all
        day INTEGER NOT NULL,                      -- the latest, in days since 1970 (UTC)
        day_gpu_s REAL NOT NULL                    -- on that day
    );
    ALTER TABLE tasks ADD COLUMN start_by REAL;    -- in seconds of the KeepClock; NULL: any time
    """,
    """
    ALTER TABLE samples ADD COLUMN machine TEXT NOT NULL DEFAULT 'local';
    DROP INDEX samples_by_model;
    CREATE INDEX samples_by_machine ON samples (machine, model, number);
    ALTER TABLE loads RENAME TO old_loads;
    CREATE TABLE loads (
        model TEXT NOT NULL,
        seconds REAL NOT NULL,
        machine TEXT NOT NULL DEFAULT 'local',
        PRIMARY KEY (machine, model)
    );
    INSERT INTO loads (model, seconds) SELECT model, seconds FROM old_loads;
    DROP TABLE old_loads;
    CREATE TABLE speeds (                          -- measured, for first forecasts
        machine TEXT PRIMARY KEY,
        flop_per_s REAL NOT NULL
    );
    """,
    """
    ALTER TABLE outcomes ADD COLUMN model TEXT NOT NULL DEFAULT '';   -- '': not known
    ALTER TABLE outcomes ADD COLUMN machine TEXT NOT NULL DEFAULT '';
    ALTER TABLE outcomes ADD COLUMN ended_at REAL NOT NULL DEFAULT 0; -- unix seconds
    CREATE TABLE busy (                            -- GPU seconds of the latest hours
        hour INTEGER NOT NULL,                     -- since 1970
        machine TEXT NOT NULL,
        gpu_s REAL NOT NULL,
        PRIMARY KEY (hour, machine)
    );
    """,
    """
    ALTER TABLE tasks ADD COLUMN machine TEXT NOT NULL DEFAULT 'local'; -- of its latest claim
    """,
    """
    ALTER TABLE tasks ADD COLUMN kept INTEGER NOT NULL DEFAULT 0;   -- pinned by its client
    CREATE INDEX kept_tasks ON tasks (owner) WHERE kept;
    """,
    """
    ALTER TABLE tasks ADD COLUMN retried_after INTEGER NOT NULL DEFAULT 0; -- claims until then
    """,
    "ALTER TABLE speeds ADD COLUMN by_product TEXT NOT NULL DEFAULT '{}';"  # JSON
    "ALTER TABLE speeds ADD COLUMN mlx TEXT NOT NULL DEFAULT '';",  # its version
)
"""Script n brings schema version n to n + 1 (PRAGMA user_version)."""
