BEGIN TRANSACTION;
CREATE TABLE callbacks (                       -- who has to be told yet that a task has ended
        task_id TEXT PRIMARY KEY,
        url TEXT NOT NULL,
        tries INTEGER NOT NULL DEFAULT 0,          -- that failed
        due_at REAL NOT NULL DEFAULT 0             -- not before
    );
INSERT INTO "callbacks" VALUES('waits','http://127.0.0.1:9/',0,0.0);
CREATE TABLE loads (model TEXT PRIMARY KEY, seconds REAL NOT NULL);
INSERT INTO "loads" VALUES('tiny',2.5);
CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL);
INSERT INTO "marks" VALUES('keep_offset_s',500.0);
INSERT INTO "marks" VALUES('event_id',2000000.0);
CREATE TABLE outcomes (                        -- what was forecast at submit, and what came
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        urgent INTEGER NOT NULL,
        forecast_s REAL NOT NULL,
        p90_s REAL NOT NULL,
        actual_s REAL NOT NULL
    );
INSERT INTO "outcomes" VALUES(1,1,2.5,4.0,3.0);
CREATE TABLE samples (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        work TEXT NOT NULL,                        -- JSON
        measured TEXT NOT NULL                     -- JSON
    , model TEXT);
INSERT INTO "samples" VALUES(1,'{"model": "tiny", "parameters_b": 0.001, "tokens": 16, "steps": 2, "format": "PNG", "images": 1, "text_each": false}','{"text_encoding_s": 0.1, "step_s": [0.7, 0.3], "decoding_s": 2.5, "image_encoding_s": 0.01}','tiny');
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
        fetched_at REAL,                           -- when its image was sent and shall go
        measured TEXT,                             -- JSON: seconds of each phase
        image_bytes INTEGER,                       -- size of its image file
        error_code TEXT,
        error TEXT,
        gone TEXT                                  -- why there is nothing to see any more
    , gone_at REAL, image_sizes TEXT, fetched TEXT, kept_since REAL);
INSERT INTO "tasks" VALUES(1,'waits','key',0,'waiting',0,'{"prompt":"a lighthouse","seed":7,"width":64,"height":64,"steps":2,"guidance":null,"format":"PNG","quality":85,"model":"tiny","quantize":null,"count":1,"negative_prompt":null,"scheduler":null,"init_image":null,"image_strength":null,"images":[],"mask":null,"control_image":null,"control_strength":null,"control_type":null,"loras":[],"upscale":null,"upscaler":null,"metadata":true,"warnings":[],"asked":""}',1000.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "tasks" VALUES(2,'urgent',NULL,1,'waiting',0,'{"prompt":"a lighthouse","seed":7,"width":64,"height":64,"steps":2,"guidance":null,"format":"PNG","quality":85,"model":"tiny","quantize":null,"count":1,"negative_prompt":null,"scheduler":null,"init_image":null,"image_strength":null,"images":[],"mask":null,"control_image":null,"control_strength":null,"control_type":null,"loras":[],"upscale":null,"upscaler":null,"metadata":true,"warnings":[],"asked":""}',1000.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "tasks" VALUES(3,'runs',NULL,0,'running',1,'{"prompt":"a lighthouse","seed":7,"width":64,"height":64,"steps":2,"guidance":null,"format":"PNG","quality":85,"model":"tiny","quantize":null,"count":3,"negative_prompt":null,"scheduler":null,"init_image":null,"image_strength":null,"images":[],"mask":null,"control_image":null,"control_strength":null,"control_type":null,"loras":[],"upscale":null,"upscaler":null,"metadata":true,"warnings":[],"asked":""}',1000.0,1001.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "tasks" VALUES(4,'done',NULL,0,'done',1,'{"prompt":"a lighthouse","seed":7,"width":64,"height":64,"steps":2,"guidance":null,"format":"PNG","quality":85,"model":"tiny","quantize":null,"count":2,"negative_prompt":null,"scheduler":null,"init_image":null,"image_strength":null,"images":[],"mask":null,"control_image":null,"control_strength":null,"control_type":null,"loras":[],"upscale":null,"upscaler":null,"metadata":true,"warnings":[],"asked":""}',1000.0,1001.0,1002.0,NULL,'[{"text_encoding_s": 0.1, "step_s": [0.7, 0.3], "decoding_s": 2.5, "image_encoding_s": 0.01}]',14,NULL,NULL,NULL,NULL,'[7, 7]','[1]',1002.0);
INSERT INTO "tasks" VALUES(5,'failed',NULL,0,'failed',1,'{"prompt":"a lighthouse","seed":7,"width":64,"height":64,"steps":2,"guidance":null,"format":"PNG","quality":85,"model":"tiny","quantize":null,"count":1,"negative_prompt":null,"scheduler":null,"init_image":null,"image_strength":null,"images":[],"mask":null,"control_image":null,"control_strength":null,"control_type":null,"loras":[],"upscale":null,"upscaler":null,"metadata":true,"warnings":[],"asked":""}',1000.0,1001.0,1002.0,NULL,NULL,NULL,'task_failed','why',NULL,NULL,NULL,NULL,1002.0);
INSERT INTO "tasks" VALUES(6,'cancelled',NULL,0,'cancelled',0,'{"prompt":"a lighthouse","seed":7,"width":64,"height":64,"steps":2,"guidance":null,"format":"PNG","quality":85,"model":"tiny","quantize":null,"count":1,"negative_prompt":null,"scheduler":null,"init_image":null,"image_strength":null,"images":[],"mask":null,"control_image":null,"control_strength":null,"control_type":null,"loras":[],"upscale":null,"upscaler":null,"metadata":true,"warnings":[],"asked":""}',1000.0,NULL,1002.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1002.0);
INSERT INTO "tasks" VALUES(7,'gone',NULL,0,'done',1,NULL,1000.0,1001.0,1002.0,NULL,NULL,NULL,NULL,NULL,'It has expired.',1003.0,NULL,NULL,1002.0);
CREATE INDEX samples_by_model ON samples (model, number);
CREATE INDEX tasks_by_keeping ON tasks (gone, status, kept_since);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('tasks',7);
INSERT INTO "sqlite_sequence" VALUES('samples',1);
INSERT INTO "sqlite_sequence" VALUES('outcomes',1);
COMMIT;
PRAGMA user_version = 5;
