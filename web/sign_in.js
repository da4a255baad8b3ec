// Signing in: a server with keys answers nothing without one.

import * as api from "./api.js";
import { find, setText } from "./dom.js";

let asking = null;

/** Asks for a key until the server accepts one. Returns at once where none is needed. */
export async function signedIn() {
  const session = await api.session().catch(() => null); // unreachable: the page shows it
  return session?.needs_key ? askForKey() : session;
}

/** Shows the dialog; several calls show one. Returns the session of the key. */
export function askForKey() {
  asking ??= new Promise((signed) => {
    find("sign-in-form").onsubmit = async (event) => {
      event.preventDefault();
      const session = await tryKey();
      if (session) signed(session);
    };
    find("sign-in").oncancel = (event) => event.preventDefault(); // Escape
    find("sign-in").showModal();
  }).finally(() => {
    asking = null;
    find("sign-in").close();
  });
  return asking;
}

async function tryKey() {
  setText(find("key-error"), "");
  try {
    return await api.signIn(find("sign-in-key").value.trim());
  } catch (error) {
    const wrong = error instanceof api.Refused && error.status === 401;
    setText(find("key-error"), wrong ? "This key is not known here." : error.message);
    find("sign-in-key").focus();
    return null;
  }
}
