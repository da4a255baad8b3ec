// Signing in: a server with keys answers nothing without one.

import * as api from "./api.js";
import { t } from "./language.js";

let asking = null;

/** Asks for a key until the server accepts one. Returns at once where none is needed. */
export async function signedIn() {
  const session = await api.session().catch(() => null); // unreachable: the page shows it
  return session?.needs_key ? askForKey() : session;
}

/** Shows the dialog; several calls show one. Returns the session of the key. */
export function askForKey() {
  asking ??= dialog().finally(() => {
    asking = null;
  });
  return asking;
}

async function dialog() {
  const { keyDialog } = await import("./key_dialog.js");
  return keyDialog({ title: t("sign_in.title"), hint: t("sign_in.hint"), check: signIn });
}

async function signIn(key) {
  try {
    return await api.signIn(key);
  } catch (error) {
    const wrong = error instanceof api.Refused && error.status === 401;
    throw wrong ? new Error(t("sign_in.wrong")) : error;
  }
}
