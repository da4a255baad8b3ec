// Signing in: a server with keys answers nothing without one.

import * as api from "./api.js";
import { find, setText } from "./dom.js";

/** Asks for a key until the server accepts one. Returns at once where none is needed. */
export async function signedIn() {
  const session = await api.session().catch(() => null); // unreachable: the page shows it
  if (!session?.needs_key) return session;
  find("sign-in").addEventListener("cancel", (event) => event.preventDefault()); // Escape
  find("sign-in").showModal();
  return new Promise((signed) => {
    find("sign-in-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      setText(find("key-error"), "");
      try {
        const answer = await api.signIn(find("sign-in-key").value.trim());
        find("sign-in").close();
        signed(answer);
      } catch (error) {
        const wrong = error instanceof api.Refused && error.status === 401;
        setText(find("key-error"), wrong ? "This key is not known here." : error.message);
        find("sign-in-key").focus();
      }
    });
  });
}
